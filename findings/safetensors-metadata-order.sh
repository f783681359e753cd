#!/bin/sh
# safetensors writes the entries of the metadata in a random order.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 safetensors==0.8.0; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

venv/bin/python -I - <<'END'
import hashlib
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

print("software:   safetensors", version("safetensors"))
print("behavior:   the same tensors and the same metadata give another file nearly every time: the order of the")
print("            metadata's entries is random, within one process too. With one entry, files are equal.")
print("most guess: equal input gives equal bytes, so that a digest tells whether a checkpoint is the same")


def digests(entries: int) -> int:
    """How many different files 20 equal calls write."""
    seen = set()
    for _ in range(20):
        metadata = {f"key{i}": str(i) for i in range(entries)}
        save_file({"weight": torch.ones(4)}, "a.safetensors", metadata=metadata)
        assert torch.equal(load_file("a.safetensors")["weight"], torch.ones(4))
        seen.add(hashlib.sha256(Path("a.safetensors").read_bytes()).hexdigest())
    return len(seen)


one, eight = digests(1), digests(8)
print(f"seen:       20 equal calls wrote {one} different file with one entry, {eight} different files with eight")
raise SystemExit(0 if one == 1 and eight > 10 else 1)
END
