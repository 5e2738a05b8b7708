"""A trained model as others read it: its weights with the adapters added, as safetensors and as GGUF.

Writers fill a folder that is given to them, one tensor after the other. How a folder reaches its place whole, and what
else lies in it, is :mod:`unsloth.runtime.export`'s.
"""
