"""The model families: one file each, which is called as transformers calls its `model_type`."""
