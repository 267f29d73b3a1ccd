"""Files: atomic writes, manifests, the events of a run and the layout of its folder.

What is written here is complete or absent, and says so: a file is replaced in one step, a folder of files carries
a manifest with their sizes and SHA-256, and a log ends at a byte that a checkpoint remembers. The time in these
files is information for people; nothing is ordered or compared by it, so a clock may jump.
"""

from tessera.store.checkpoint_path import find_checkpoint, verify_checkpoint
from tessera.store.events import EventWriter, read_events
from tessera.store.files import sha256_file, write_atomic
from tessera.store.json_text import write_json
from tessera.store.manifest import publish_folder, verify_manifest, write_manifest
from tessera.store.run_folder import RunFolder

__all__ = [
    "EventWriter",
    "RunFolder",
    "find_checkpoint",
    "publish_folder",
    "read_events",
    "sha256_file",
    "verify_checkpoint",
    "verify_manifest",
    "write_atomic",
    "write_json",
    "write_manifest",
]
