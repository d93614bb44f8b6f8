"""A vision-language model of the GPT-4V family for transformers, registered with its Auto classes.

Made for transformers 5; tested with 5.0.0 and 5.23.0.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from .configuration_gpt4v import GPT4VConfig, GPT4VTextConfig, GPT4VVisionConfig
from .image_processing_gpt4v import GPT4VImageProcessor
from .modeling_gpt4v import GPT4VForConditionalGeneration, GPT4VModel, GPT4VPreTrainedModel
from .presets import PRESETS, parameter_count
from .processing_gpt4v import GPT4VProcessor
from .tokenization_gpt4v import GPT4VTokenizer

AutoConfig.register("gpt4v", GPT4VConfig)
AutoModel.register(GPT4VConfig, GPT4VModel)
AutoModelForCausalLM.register(GPT4VConfig, GPT4VForConditionalGeneration)
AutoModelForImageTextToText.register(GPT4VConfig, GPT4VForConditionalGeneration)
AutoTokenizer.register(GPT4VConfig, fast_tokenizer_class=GPT4VTokenizer)
AutoImageProcessor.register(GPT4VConfig, slow_image_processor_class=GPT4VImageProcessor)
AutoProcessor.register(GPT4VConfig, GPT4VProcessor)

__all__ = [
    "PRESETS",
    "GPT4VConfig",
    "GPT4VForConditionalGeneration",
    "GPT4VImageProcessor",
    "GPT4VModel",
    "GPT4VPreTrainedModel",
    "GPT4VProcessor",
    "GPT4VTextConfig",
    "GPT4VTokenizer",
    "GPT4VVisionConfig",
    "parameter_count",
]
