"""Indexed WebDataset shards: pack, index, order (pure), reader, transforms, loader. Imports nothing."""
