"""Token ids of a split, computed once and kept on disk.

Rows are ragged: one flat array of ids and the offset of each row. Files are keyed by
all that the ids depend on, hold no pickles, and appear whole or not at all.
"""

import dataclasses
import hashlib
import json
import logging
import os
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int32, Int64

from lowrank.core.errors import BadInput, CannotWrite
from lowrank.data.splits import Split
from lowrank.data.store import cache_folder

logger = logging.getLogger(__name__)

#: Version of the stored layout and of how ids are made; a part of the key.
TOKENS_VERSION = 1
_BATCH = 4096
#: What NumPy, zipfile and json raise for damaged files.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Token ids of the rows of a split.

    Attributes:
      ids: The ids of all rows, one after the other.
      offsets: Row i is ``ids[offsets[i]:offsets[i + 1]]``.
      max_length: Longest row that was kept.
      num_truncated: Rows that were longer and lost their end.
      num_suffix: Special tokens that close every row, as [SEP]; they survive a cut.
      pad_id: Fills batches; masked, so its value has no effect.
      fingerprint: sha256 of tokenizer, data, rows and `max_length`.
      types: Which text of a pair each id belongs to, 0 or 1; None of single texts.
    """

    ids: Int32[np.ndarray, " tokens"]
    offsets: Int64[np.ndarray, " rows_and_one"]
    max_length: int
    num_truncated: int
    num_suffix: int
    pad_id: int
    fingerprint: str
    types: Int32[np.ndarray, " tokens"] | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Int64[np.ndarray, " rows"]:
        """Tokens of each row."""
        return np.diff(self.offsets)

    def row(self, number: int) -> Int32[np.ndarray, " length"]:
        """The ids of one row."""
        return self.ids[self.offsets[number] : self.offsets[number + 1]]

    def report(self) -> dict[str, Any]:
        """Number of rows, truncated rows and length quantiles, for the record."""
        lengths = self.lengths
        quantiles = np.quantile(lengths, [0.0, 0.5, 0.95, 1.0]) if len(self) else []
        names = ("min", "median", "p95", "max")
        return {
            "rows": len(self),
            "num_truncated": self.num_truncated,
            "max_length": self.max_length,
            "lengths": dict(zip(names, map(float, quantiles), strict=False)),
        }


def tokenize(
    split: Split,
    tokenizer: tokenizers.Tokenizer,
    *,
    max_length: int,
    data: str,
    cache: str | os.PathLike[str] | None = None,
) -> Tokens:
    """Token ids of a split, from the cache where they are already known.

    Padding and truncation that the tokenizer came with are replaced: rows are not
    padded, and cut at `max_length` so that closing special tokens stay.

    Args:
      split: The rows.
      tokenizer: It is not changed.
      max_length: Longest row in tokens, special tokens included.
      data: Fingerprint of the task.
      cache: Folder of token files; $LOWRANK_CACHE/tokens if None.

    Raises:
      BadInput: `max_length` has no room for text, or a row has no tokens.
      CannotWrite: The cache cannot be written.
    """
    private = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    private.no_padding()
    private.no_truncation()
    num_special = private.num_special_tokens_to_add(False)
    if max_length <= num_special:
        raise BadInput(
            f"max_length = {max_length} has no room for text beside {num_special} "
            "special tokens"
        )
    pad_id = _pad_id(tokenizer)
    key = _key(private, split, max_length, data, pad_id)
    path = cache_folder("tokens", cache) / f"{key[:32]}.npz"
    found = _load(path, key)
    if found is None:
        found = _encode(split, private, max_length, pad_id, key)
        _save(path, found)
    if found.num_truncated:
        logger.warning(
            "%d of %d rows are longer than %d tokens and lose their end",
            found.num_truncated,
            len(found),
            max_length,
        )
    return found


def _key(
    tokenizer: tokenizers.Tokenizer,
    split: Split,
    max_length: int,
    data: str,
    pad_id: int,
) -> str:
    parts = [
        str(TOKENS_VERSION),
        tokenizers.__version__,
        hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
        split.fingerprint(),
        data,
        str(max_length),
        str(pad_id),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _encode(
    split: Split,
    private: tokenizers.Tokenizer,
    max_length: int,
    pad_id: int,
    key: str,
) -> Tokens:
    private.enable_truncation(max_length)
    rows: list[np.ndarray] = []
    types: list[np.ndarray] = []
    num_truncated, num_suffix = 0, 0
    for first in range(0, len(split), _BATCH):
        texts: list[Any] = list(split.texts[first : first + _BATCH])
        if split.pairs is not None:
            pairs = split.pairs[first : first + _BATCH]
            texts = list(zip(texts, pairs, strict=True))
        try:
            encodings = private.encode_batch(texts)
        except Exception as error:
            # The tokenizers package raises nothing more specific.
            raise BadInput(
                f"the tokenizer cannot encode rows {split.ids[first]!r} and following: "
                f"{error}. Choose a base whose tokenizer knows their characters."
            ) from error
        for encoding in encodings:
            if all(encoding.special_tokens_mask):
                number = len(rows)
                raise BadInput(
                    f"row {split.ids[number]!r} has no tokens: "
                    f"{split.texts[number]!r:.80}. Remove it, or choose a base whose "
                    "tokenizer knows its characters."
                )
            num_suffix = _num_suffix(encoding.special_tokens_mask)
            rows.append(np.asarray(encoding.ids, np.int32))
            types.append(np.asarray(encoding.type_ids, np.int32))
            num_truncated += bool(encoding.overflowing)
    lengths = np.array([len(row) for row in rows], np.int64)
    return Tokens(
        ids=np.concatenate(rows) if rows else np.zeros(0, np.int32),
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        max_length=max_length,
        num_truncated=num_truncated,
        num_suffix=num_suffix,
        pad_id=pad_id,
        fingerprint=key,
        types=None if split.pairs is None else np.concatenate(types),
    )


def _num_suffix(special: Sequence[int]) -> int:
    """How many special tokens close a row."""
    count = 0
    while special[-1 - count]:
        count += 1
    return count


def _pad_id(tokenizer: tokenizers.Tokenizer) -> int:
    if tokenizer.padding is not None:
        return int(tokenizer.padding["pad_id"])
    for name in ("[PAD]", "<pad>"):
        if (found := tokenizer.token_to_id(name)) is not None:
            return found
    # A decoder has none; whatever stands there is masked.
    return 0


def _save(path: Path, tokens: Tokens) -> None:
    facts = {
        field.name: getattr(tokens, field.name)
        for field in dataclasses.fields(tokens)
        if field.name not in ("ids", "offsets", "types")
    }
    types: dict[str, Any] = {} if tokens.types is None else {"types": tokens.types}
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(".tmp", f".{path.stem}-", path.parent)
        with os.fdopen(handle, "wb") as file:
            np.savez(
                file,
                ids=tokens.ids,
                offsets=tokens.offsets,
                **types,
                facts=np.frombuffer(json.dumps(facts).encode(), np.uint8),
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise CannotWrite(
            f"cannot write the token cache {path}: {error.strerror or error}. Free "
            "space there, or point LOWRANK_CACHE (or run.cache) to another folder."
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _load(path: Path, key: str) -> Tokens | None:
    """The stored tokens; None if there are none or the file is damaged."""
    if not os.path.isfile(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            facts = json.loads(stored["facts"].tobytes())
            ids, offsets = stored["ids"], stored["offsets"]
            types = stored["types"] if "types" in stored.files else None
        tokens = Tokens(ids=ids, offsets=offsets, types=types, **facts)
        if tokens.fingerprint != key:
            raise ValueError("it holds other rows than its name says")
        return tokens
    except _DAMAGE as error:
        logger.warning("token cache %s is damaged (%s): made again", path, error)
        return None
