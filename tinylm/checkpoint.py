"""A run directory on disk: a model directory that `transformers` opens, and what resuming needs.

    config.json, model.safetensors, tokenizer.json, ...    the model: load, save
    training/checkpoint.safetensors                        all that resuming reads: Checkpoint

Every file is replaced by one rename (files.py), so that a run killed at any moment leaves whole
files only. Weights are read with the safetensors library; pickle is never read.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)
import numpy
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tinylm import backend
from tinylm.chat import template_of, with_chat_tokens
from tinylm.config import from_json, to_json
from tinylm.errors import InputError
from tinylm.files import read_json, replace_file, write_json
from tinylm.model import Transformer
from tinylm.tokenizer import Tokenizer

Tensors = dict[str, numpy.ndarray]
FLOATS = ("F32", "F16", "BF16", "F64")
# masks and rotary frequencies, which older versions of transformers saved beside the weights
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")

# ---- a model directory -------------------------------------------------------------------------


def load(path: str | Path) -> tuple[Transformer, Tokenizer | None]:
    """Open a run directory or any supported Hugging Face model directory.

    Returns (model, tokenizer), or (model, None) where there is no tokenizer.json. Weights become
    float32. Raises InputError naming the file and what is wrong with it.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such directory")
    described = folder / "config.json"
    if not described.exists():
        raise InputError(f"{described}: no such file; a model directory needs it")
    content = read_json(described)
    try:
        config = from_json(content)
    except InputError as error:
        raise InputError(f"{described}: {error}") from None
    except (AttributeError, TypeError) as error:
        raise InputError(f"{described}: not what a config.json holds ({error})") from None
    tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").exists() else None
    if tokenizer and tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"{folder}/tokenizer.json: {tokenizer.vocab_size} tokens, but config.json has a "
            f"vocab_size of {config.vocab_size}: these files do not belong together"
        )
    model = Transformer(config)
    weights = {}
    for file in weight_files(folder):
        weights |= read_tensors(file)
    set_weights(model, weights, folder)
    if tokenizer:
        model.n_tokens = tokenizer.vocab_size
        if template_of(tokenizer) and not config.scores:
            stop_at_the_end(model, tokenizer)
    if (folder / "generation_config.json").exists():
        stop_as_well(model, read_json(folder / "generation_config.json").get("eos_token_id"))
    return model, tokenizer


def stop_at_the_end(model: Transformer, tokenizer: Tokenizer) -> None:
    """A turn ends with the tokenizer's end token, whether or not config.json names it."""
    stop = model.config.stop_ids
    if tokenizer.eos_id is not None and tokenizer.eos_id not in stop:
        model.config.eos_token_id = [tokenizer.eos_id, *stop]


def stop_as_well(model: Transformer, ids: int | list[int] | None) -> None:
    """At these tokens too, as `transformers` does; 50256 it writes for GPT-2s of any vocabulary."""
    stop, known = model.config.stop_ids, range(model.config.vocab_size)
    more = [i for i in (ids if isinstance(ids, list) else [ids]) if i in known and i not in stop]
    if more:
        model.config.eos_token_id = [*stop, *dict.fromkeys(more)]


def load_for_text(path: str | Path, writes: bool = True) -> tuple[Transformer, Tokenizer]:
    """`load`; raises InputError for a reward model, unless it need not write, or for ids alone."""
    model, tokenizer = load(path)
    if writes and model.config.scores:
        raise InputError(f"{path} is a reward model: it scores answers and writes none")
    if tokenizer is None:
        raise InputError(f"{path}/tokenizer.json: no such file; text needs it")
    return model, tokenizer


def load_for_chat(
    path: str | Path, writes: bool = True
) -> tuple[Transformer, Tokenizer, list[str] | None]:
    """`load_for_text`, and where there is no chat template yet, one is given to the tokenizer.

    Also returns what special tokens that took (new rows of the embedding), or None if it had one.
    """
    model, tokenizer = load_for_text(path, writes)
    if template_of(tokenizer):
        added = None
    else:
        tokenizer, added = with_chat_tokens(tokenizer)
        model.grow_vocabulary(tokenizer.vocab_size)
        stop_at_the_end(model, tokenizer)
    if not model.config.stop_ids:
        raise InputError(f"{path}: it names no end-of-turn token (eos_token in its configuration)")
    return model, tokenizer, added


def save(model: Transformer, tokenizer: Tokenizer | None, path: str | Path) -> None:
    """Write a directory that `transformers` opens. Existing model files in it are replaced."""
    folder = Path(path)
    save_description(model, tokenizer, folder)
    save_weights(model, folder)


def save_description(model: Transformer, tokenizer: Tokenizer | None, folder: Path) -> None:
    """Everything of a model directory that stays the same while the weights learn."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    write_json(folder / "config.json", to_json(config))
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    write_json(folder / "generation_config.json", ids)
    if tokenizer is not None:
        tokenizer.save(folder)


def save_weights(model: Transformer, folder: Path) -> None:
    tensors = {name: backend.to_numpy(p.data) for name, p in model.parameters().items()}
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.exists():
        return [folder / "model.safetensors"]
    names = set(read_json(index).get("weight_map", {}).values())
    if any(Path(name).name != name for name in names):
        raise InputError(f"{index}: a shard outside the directory is refused")
    return [folder / name for name in sorted(names)]


def set_weights(model: Transformer, weights: Tensors, folder: Path) -> None:
    """Put the file's tensors into the model. Raises InputError naming what is missing or misshapen.

    A checkpoint of the bare model, whose names lack the leading `transformer.` or `model.`, is read
    too.
    """
    for name, parameter in model.parameters().items():
        found = name if name in weights else name.split(".", 1)[1]
        if found not in weights:
            raise InputError(f"{folder}/model.safetensors: the tensor {name} is missing")
        values = weights.pop(found)
        if values.shape != parameter.shape:
            raise InputError(
                f"{folder}/model.safetensors: {name} has shape {values.shape}, "
                f"but config.json asks for {parameter.shape}"
            )
        parameter.data = backend.asarray(values)
    head, table = weights.pop("lm_head.weight", None), model.embedding.weight.data
    tied = head is None or model.config.scores or numpy.array_equal(head, backend.to_numpy(table))
    if not tied:
        raise InputError(
            f"{folder}/model.safetensors: lm_head.weight is not the embedding table, "
            "but config.json ties them (tie_word_embeddings)"
        )
    if weights:
        raise InputError(f"{folder}/model.safetensors: unknown tensor {min(weights)}")


# ---- what resuming reads -----------------------------------------------------------------------


class Checkpoint:
    """training/checkpoint.safetensors: float32 weights, optimizer moments, and a state dictionary.

    The state (step, position in the data, random states, config) lies in the file's metadata, so
    that one rename replaces everything at once.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / "training" / "checkpoint.safetensors"

    def exists(self) -> bool:
        return self.path.exists()

    def save(self, model: Transformer, optimizer, state: dict, good: Tensors | None = None) -> None:
        """good: earlier tensors that the run may go back to."""
        tensors = tensors_of(model, optimizer)
        tensors |= {f"good/{name}": x for name, x in (good or {}).items()}
        write_tensors(self.path, tensors, {"state": json.dumps(state)})

    def state(self) -> dict:
        """The state alone, without reading the tensors."""
        with open_tensors(self.path) as file:
            return json.loads(file.metadata()["state"])

    def restore(self, model: Transformer, optimizer) -> Tensors:
        """Put weights and moments back, in place; returns those that the run may go back to.

        Raises InputError where they are of a model of another shape.
        """
        tensors = read_tensors(self.path)
        found = {name: x.shape for name, x in tensors.items() if name.startswith("param/")}
        if found != {f"param/{name}": p.shape for name, p in model.parameters().items()}:
            raise InputError(f"{self.path}: this run was begun with another model: name the same")
        put_tensors(model, optimizer, tensors)
        return {k.removeprefix("good/"): x for k, x in tensors.items() if k.startswith("good/")}


def digest(folder: str | Path) -> str:
    """Of the weights in a model directory, by which a resumed run knows its model again."""
    found = hashlib.blake2b(digest_size=16)
    for file in weight_files(Path(folder)):
        found.update(file.read_bytes())
    return found.hexdigest()


def tensors_of(model: Transformer, optimizer) -> Tensors:
    """Weights and moments as they are now, by name; on the CPU, not copies."""
    tensors = {}
    for name, p in model.parameters().items():
        tensors[f"param/{name}"] = backend.to_numpy(p.data)
        tensors[f"m/{name}"] = backend.to_numpy(optimizer.m[name])
    for name, v in optimizer.v.items():  # Muon keeps none for the matrices that it moves
        tensors[f"v/{name}"] = backend.to_numpy(v)
    return tensors


def put_tensors(model: Transformer, optimizer, tensors: Tensors) -> None:
    """Make such weights and moments the present ones."""
    for name, p in model.parameters().items():
        p.data = backend.asarray(tensors[f"param/{name}"])
        optimizer.m[name] = backend.asarray(tensors[f"m/{name}"])
    for name in optimizer.v:
        optimizer.v[name] = backend.asarray(tensors[f"v/{name}"])


# ---- files -------------------------------------------------------------------------------------


def write_tensors(path: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    contiguous = {name: numpy.ascontiguousarray(x) for name, x in tensors.items()}

    def write(temporary: Path) -> None:
        temporary.touch()
        mode = temporary.stat().st_mode  # of any new file: safetensors hides its own
        save_file(contiguous, temporary, metadata)
        temporary.chmod(mode)

    replace_file(path, write)


def read_tensors(path: Path) -> Tensors:
    """The tensors of a safetensors file, as float32, but for BUFFERS."""
    with open_tensors(path) as file:
        names = [name for name in file.keys() if not name.endswith(BUFFERS)]  # noqa: SIM118
        for name in names:
            kind = file.get_slice(name).get_dtype()
            if kind not in FLOATS:
                raise InputError(f"{path}: {name} is of type {kind}, expected a float type")
        return {name: numpy.asarray(file.get_tensor(name), numpy.float32) for name in names}


def open_tensors(path: Path):
    try:
        return safe_open(path, framework="numpy")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a model directory needs it") from None
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error})") from error
