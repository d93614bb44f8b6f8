"""The main job: a small GPT-4V learns to answer questions about scanned digits. See `gpt4v-fast demo
--help`."""
