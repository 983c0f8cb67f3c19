"""Checkpoints: ``tnc.json`` and safetensors shards in one folder, written whole or not at all."""

from tnc.checkpoint.folder import check_output_folder
from tnc.checkpoint.journal import Journal
from tnc.checkpoint.load import load_checkpoint, load_layers
from tnc.checkpoint.manifest import read_manifest
from tnc.checkpoint.save import save_checkpoint

__all__ = ["Journal", "check_output_folder", "load_checkpoint", "load_layers", "read_manifest", "save_checkpoint"]
