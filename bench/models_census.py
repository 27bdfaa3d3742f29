"""Try `extend` on all models: python bench/models_census.py [--check]

It builds every causal and image-text class of the installed transformers with rotary parameters,
tiny and random, and compares it with itself as docs/models.md says. Each class has its own process,
7 GiB and a time limit; three need timm. All take some 80 seconds of two cores. Prints a line per
class and writes bench/results/models/census.json (a missing field is "ok"). With --check it writes
nothing, and fails if a class is no longer served.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "models" / "census.json"
sys.path.append(str(ROOT / "tests"))

import torch  # noqa: E402
import transformers  # noqa: E402
from harness import write  # noqa: E402
from support import tiny_models  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from extrope_kernels.integrations.transformers import extend  # noqa: E402

MEMORY, WORKERS = 7 << 30, 2  # bytes of each
SECONDS = 900  # enough on machines with other load
WINDOWED = "sliding window or chunks"
PROMPT, NEW, PADS = 20, 4, 7  # tokens
FREQUENCIES: dict[str, dict[str, Any]] = {"yarn": {"factor": 4.0}, "dynamic_ntk": {"factor": 4.0}}
SCORES: dict[str, dict[str, Any]] = {
    "rerope": {"window": 6},
    "self_extend": {"window": 8, "factor": 2},
    "dual_chunk": {"chunk_size": 8, "local_window": 4},
}
# Parameters under which a method changes nothing in the model. Self-Extend keeps keys rotated.
NEUTRAL = {"rope": {}, "rerope": {"window": 64}, "self_extend": {"window": 64, "factor": 2}}


@dataclass
class Plain:
    """Results of the plain model.

    own: the difference between generation with a cache and a forward without one, large if a prompt
        sees all of itself; None if it cannot generate.
    padded: the difference between a padded row and the row alone; None if it takes no padding.
    """

    ids: Tensor
    logits: Tensor
    own: float | None = None
    padded: float | None = None


def census(name: str) -> dict[str, Any]:
    """Try one class: return for each method "ok" or the reason why not."""
    row: dict[str, Any] = {"name": name}
    try:
        model = tiny_models.build(name)
        ids = torch.randint(3, 99, (1, PROMPT), generator=torch.Generator().manual_seed(1))
        plain = Plain(ids, logits(model, ids))
        assert torch.equal(plain.logits, logits(model, ids)), "its output is drawn at random"
    except Exception as error:
        return row | {"built": short(error)}
    row |= {"built": "ok", "generates": "ok"}
    try:
        output, got = generated(model, ids)
        plain.own = error_of(got, without_cache(model, output))
    except Exception as error:
        row["generates"] = short(error)
    with contextlib.suppress(Exception):
        plain.padded = padded(model, ids)
    for method, parameters in NEUTRAL.items():
        row[f"{method}, neutral"] = attempt(same_as_plain, model, method, parameters, plain)
    for method, parameters in (FREQUENCIES | SCORES).items():
        row[method] = attempt(generates, model, method, parameters, plain)
    return row


def attempt(check: Callable, model: nn.Module, method: str, given: dict, plain: Plain) -> str:
    """Try again with layers="all" if a frequency method finds nothing to extend by default."""
    try:
        check(model, method, given, plain)
    except Exception as error:
        if WINDOWED not in short(error) or "layers" in given or method in SCORES:
            return short(error)
        said = attempt(check, model, method, given | {"layers": "all"}, plain)
        return 'ok, layers="all"' if said == "ok" else said
    return "ok"


def same_as_plain(model: nn.Module, method: str, parameters: dict[str, Any], plain: Plain) -> None:
    with extend(model, method, **parameters):
        error = error_of(logits(model, plain.ids), plain.logits)
    assert error <= 1e-3, f"differs from the plain model by {error:.2g}"


def generates(model: nn.Module, method: str, parameters: dict[str, Any], plain: Plain) -> None:
    length = {"seq_len": PROMPT + NEW} if method == "dynamic_ntk" else {}
    trained = "max_position_embeddings"
    if method in FREQUENCIES and not hasattr(model.config.get_text_config(), trained):
        name = {"yarn": f"original_{trained}"}.get(method, trained)
        parameters = parameters | {name: tiny_models.TRAINED}
    with extend(model, method, **parameters):
        changed = logits(model, plain.ids)
        if plain.own is not None:
            output, got = generated(model, plain.ids)
        if plain.padded is not None and method == "rerope":
            error = padded(model, plain.ids)
            assert error <= max(1e-4, 2 * plain.padded), f"a padded row differs by {error:.2g}"
    if plain.own is not None:
        with extend(model, method, **parameters, **length):
            error = error_of(got, without_cache(model, output))
        assert error <= max(1e-3, 2 * plain.own), f"with a cache differs by {error:.2g}"
    if method != "dynamic_ntk":  # it changes nothing within the trained length
        assert error_of(changed, plain.logits) > 1e-3, "nothing has changed"
    assert torch.equal(logits(model, plain.ids), plain.logits), "restore is not exact"


def generated(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return all tokens, and the logits of the new ones."""
    mask = torch.ones_like(ids) if mask is None else mask
    output = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return output.sequences, torch.stack(output.logits, 1)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def padded(model: nn.Module, ids: Tensor) -> float:
    """Return the difference in generation between a row padded on the left and the row alone."""
    pads = torch.zeros_like(ids[:, :PADS])
    rows, row = torch.cat((ids, torch.cat((pads, ids[:, PADS:]), 1))), ids[:, PADS:]
    mask = torch.ones_like(rows)
    mask[1:, :PADS] = 0
    return error_of(generated(model, rows, mask)[1][1:], generated(model, row)[1])


def without_cache(model: nn.Module, output: Tensor) -> Tensor:
    """Return the logits from which generated tokens are chosen."""
    return logits(model, output[:, :-1])[:, PROMPT - 1 :]


def error_of(got: Tensor, want: Tensor) -> float:
    """Return the largest difference, in units of the largest logit."""
    return ((got - want).abs().max() / want.abs().max()).item()


def short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or [''])[-1][:300]}"


def run(names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows, each from its own child process; transformers is imported once, before."""
    with multiprocessing.get_context("fork").Pool(WORKERS, _prepare, maxtasksperchild=1) as pool:
        rows = {name: pool.apply_async(census, (name,)) for name in names}
        for name, row in rows.items():
            try:
                yield row.get(SECONDS)
            except multiprocessing.TimeoutError:
                yield {"name": name, "built": f"died, or took more than {SECONDS} seconds"}


def _prepare() -> None:
    """Limit the memory and the time of a child, and silence it."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.alarm(SECONDS)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the results")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    rows = []
    for row in run(tiny_models.rotary_classes()):
        rows.append(row)
        bad = {name: said for name, said in row.items() if name != "name" and said != "ok"}
        print(row["name"], bad or "ok", flush=True)
    if args.check:
        sys.exit(lost(rows, json.loads(RESULTS.read_text())["rows"]))
    rows.sort(key=lambda row: row["name"].lower())
    rows = [{key: said for key, said in row.items() if said != "ok"} for row in rows]
    write(RESULTS, {"transformers": transformers.__version__, "rows": rows})


def lost(rows: list[dict[str, Any]], before: list[dict[str, Any]]) -> str | None:
    """Name the classes that were served before and are not now."""
    keys = ("generates", *(f"{method}, neutral" for method in NEUTRAL), *FREQUENCIES, *SCORES)
    served = {(row["name"], key) for row in before if "built" not in row for key in keys
              if row.get(key, "ok").startswith("ok")}  # fmt: skip
    now = {(row["name"], key) for row in rows for key in row if row[key].startswith("ok")}
    return "; ".join(f"{name}: {key}" for name, key in sorted(served - now)) or None


if __name__ == "__main__":
    main()
