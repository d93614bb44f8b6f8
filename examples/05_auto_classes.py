"""The checkpoint through transformers' Auto classes: beam search on a Chinese prompt."""

from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt4v_fast.models import digits_checkpoint  # importing it registers the model with the Auto classes

checkpoint = digits_checkpoint()
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
model = AutoModelForCausalLM.from_pretrained(checkpoint)
inputs = tokenizer("人工智能", return_tensors="pt")
outputs = model.generate(**inputs, max_length=50, num_beams=4, no_repeat_ngram_size=2)
print(tokenizer.decode(outputs[0], skip_special_tokens=True))
