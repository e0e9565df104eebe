"""vitdist: fine-tunes vision transformers over sharded WebDataset tars with DeepSpeed ZeRO.

Nothing is imported here, so that the login node can read settings and run folders without torch.
"""

__version__ = "0.1.0"
