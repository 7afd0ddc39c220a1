"""Tiny BERT: a folder with a two-layer BERT of random weights and its tokenizer, made without a download."""

import hashlib
import json
import os
import string
import tempfile
from importlib.resources import files
from pathlib import Path

FILES = ("model.safetensors", "tokenizer.json", "vocab.txt", "tokenizer_config.json", "config.json")
_SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
_CONFIG = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 512,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
# Must go up whenever a change of the code changes the weights or the tokenizer for the same words and configuration.
_VERSION = 1


def vocabulary() -> list[str]:
    """The WordPiece vocabulary, about 1,850 tokens in the order of their numbers, `[PAD]` first."""
    characters = string.ascii_lowercase + string.digits + string.punctuation
    text = files("openclip_otco.configs").joinpath("words.txt").read_text(encoding="utf-8")
    words = " ".join(line for line in text.splitlines() if not line.startswith("# ")).split()
    within = [f"##{character}" for character in characters]
    return list(dict.fromkeys([*_SPECIAL.values(), *characters, *within, *words]))


def recipe() -> str:
    """Eight hexadecimal digits that change whenever `make_bert_tiny` would make another folder."""
    content = json.dumps([_VERSION, _CONFIG, vocabulary()])
    return hashlib.sha256(content.encode()).hexdigest()[:8]


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import BertWordPieceTokenizer

    tokens = vocabulary()
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    BertWordPieceTokenizer({token: number for number, token in enumerate(tokens)}).save(str(folder / "tokenizer.json"))
    settings = {
        **_SPECIAL,
        "do_lower_case": True,
        "model_max_length": _CONFIG["max_position_embeddings"],
        "tokenizer_class": "BertTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _write_weights(folder: Path, seed: int) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=len(vocabulary()), architectures=["BertModel"], **_CONFIG)
    # On the meta device, the model has names and shapes of weights, but draws no random numbers: those of the caller
    # stay as they are.
    with torch.device("meta"):
        parameters = dict(BertModel(config, add_pooling_layer=False).named_parameters())
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in sorted(parameters.items()):
        if parameter.ndim == 2:
            weights[name] = torch.randn(parameter.shape, generator=generator) * config.initializer_range
        else:
            weights[name] = torch.full(parameter.shape, 1.0 if name.endswith("weight") else 0.0)
    weights["embeddings.word_embeddings.weight"][config.pad_token_id] = 0.0
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config.save_pretrained(folder)


def make_bert_tiny(folder: str | Path, seed: int = 0) -> None:
    """Makes the folder, or repairs it; equal seeds give equal bytes.

    Each file appears whole or not at all, and `config.json` last, so several processes may make one folder at once.

    Args:
        folder: made with its parents where missing.
        seed: seed of the random weights.

    Raises:
        OSError: `folder` cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as name:
        partial = Path(name)
        _write_tokenizer(partial)
        _write_weights(partial, seed)
        for file in FILES:
            os.replace(partial / file, folder / file)


def broken_file(folder: str | Path) -> str | None:
    """The first file of a BERT folder that is missing or cut short, None when the folder is whole.

    A folder's tokenizer may be a `tokenizer.json` or a `vocab.txt`, its weights a `model.safetensors`, whole or in
    parts, or a `pytorch_model.bin`.
    """
    folder = Path(folder)
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "config.json"
    if not any(_filled(folder / name) for name in ("tokenizer.json", "vocab.txt")):
        return "tokenizer.json"
    others = ("model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    weights = folder / "model.safetensors"
    if whole_safetensors(weights) or (not weights.exists() and any(_filled(folder / name) for name in others)):
        return None
    return "model.safetensors"


def _filled(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def whole_safetensors(path: Path) -> bool:
    """Whether the file is there and not cut short.

    Reads the header only: eight bytes of its length, then JSON with each tensor's place in the rest of the file."""
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if length < path.stat().st_size else None
    except (OSError, ValueError):
        return False
    if not isinstance(header, dict):
        return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return path.stat().st_size == 8 + length + max(ends, default=0)
