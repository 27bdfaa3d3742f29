"""Show a real model past its training length: make demo.

First a needle: a sentence in a text of twice the training length, and a question about it at the
end, farther from it than the training length. Then the loss by position and the recall by distance,
as a picture. A second call goes on where the first was stopped. `--plan` only says what will be
done: any Python runs it.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

OUT = Path(__file__).parents[1] / "build" / "demo"
LENGTH = 16384  # tokens, twice the trained length
NEW = 16  # tokens of an answer, which count
NEEDLE = "The access code of the Green Lighthouse is 7481952."
QUESTION = "What is the access code of the Green Lighthouse?"
ANSWER = "The access code of the Green Lighthouse is"  # what the model goes on from
METHODS = {"rope": {}, "yarn": {"factor": 2.0}, "rerope": {"window": 4096}}
CURVES = {"loss": ("rope", "pi", "yarn", "rerope"), "recall": ("rope", "yarn", "rerope")}
READINGS = sum(map(len, CURVES.values()))

PLAN = f"""SmolLM2-135M-Instruct (weights of 4 bits, Q4_1), trained to 8,192 tokens, reads
{LENGTH:,}: unmodified, with YaRN, with ReRoPE.
  1. A needle: a sentence is hidden in a long text, and asked for. Who repeats it? Two minutes.
  2. Curves: how well the next token is predicted, and how much a passage helps that was read
     before: {READINGS} texts, eight minutes. They leave {OUT / "demo.png"}.
Times are of two idle cores: longer beside other work.
Before that, once: packages into .venv (1.1 GB with a torch for CPUs, more with one for CUDA), the
model into ~/.cache/extrope_kernels (540 MB), and the C++ kernels are compiled (1 to 5 minutes).
Ctrl-C keeps what is done, and make demo goes on from there.
"""


def main() -> int:
    if sys.argv[1:] == ["--plan"]:
        print(PLAN, flush=True)
        return 0
    try:
        return show()
    except KeyboardInterrupt:
        kept = f"{OUT} keeps what was done, and make demo goes on from there"
        kept = kept if any(OUT.glob("*.json")) else "nothing was done yet"
        print(f"\ndemo: interrupted; {kept}", file=sys.stderr)
        return 130


def show() -> int:
    """Show both parts and return the exit code. All imports are here: Ctrl-C may come in them."""
    from harness import kept_memory

    from extrope_kernels._usage import UsageError, stay_offline

    stay_offline()
    try:
        with kept_memory():
            find_needle()
            draw_curves()
    except UsageError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    return 0


def find_needle() -> None:
    """Ask for the needle under each method, and show the answers."""
    from extrope_kernels import extend
    from extrope_kernels.evaluation import models, options, packages, report

    files, device = models.prepared(packages.SMOLLM2, None)
    dtype = faster_dtype(device)
    model, tokenizer = models.load_model(files, dtype, device), models.load_tokenizer(files)
    ids, before = hide(tokenizer)
    about = {"length": LENGTH, "before": before, "needle": NEEDLE}
    rows = report.Rows(options.check_out(OUT) / "needle.json", about, ("method", "params", "dtype"))
    plans = [{"method": m, "params": p, "dtype": dtype} for m, p in METHODS.items()]
    missing = sum(rows.known(plan) is None for plan in plans)

    def ask(method: str, params: dict, **_: str) -> dict[str, str]:
        with extend(model, method, **params):  # which tries the model on four tokens
            display.begin(f"reading, {called(method)}", len(models.decoder_layers(model)))
            return {"answer": answer(model, tokenizer, ids)}

    after = ids.shape[1] - before
    print(f"\n1. A needle. {LENGTH:,} tokens of the Python reference, among them\n     {NEEDLE}")
    print(f"   and {after:,} tokens later, at the end\n     {QUESTION}\n", flush=True)
    with (
        report.Display(sys.stdout, missing) as display,
        models.after_each_layer(model, display.tick),
    ):
        for plan in plans:
            row = rows.known(plan) or rows.add(plan, partial(ask, **plan))
            found = "found" if NEEDLE.split()[-1] in row["answer"] else "not found"
            name = report.name_of(called(row["method"]), row["params"])
            display.line(
                f"   {name:<20} {row['seconds']:3.0f} s  {found:<10} {said(row['answer'])}"
            )
    print(f"\n   One text shows little. {ruler_of_all()}", flush=True)


def faster_dtype(device: str) -> str:
    """Return "bfloat16" where the device multiplies in it faster than in float32."""
    import torch

    seconds = {}
    for dtype in ("float32", "bfloat16"):
        matrix = torch.ones(1024, 1024, dtype=getattr(torch, dtype), device=device)
        (matrix @ matrix).sum().item()  # the first one loads kernels
        began = time.perf_counter()
        (matrix @ matrix).sum().item()
        seconds[dtype] = time.perf_counter() - began
    return min(seconds, key=seconds.__getitem__)


def hide(tokenizer):
    """Return the Python reference with the needle in it: (1, LENGTH - NEW) int64; its place."""
    import torch

    from extrope_kernels.evaluation import texts

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    start = tokens("Remember the access code in the following text.\n\n")
    needle, end = tokens(f"\n{NEEDLE}\n"), tokens(f"\n\nQuestion: {QUESTION}\nAnswer: {ANSWER}")
    room = LENGTH - NEW - len(start) - len(needle) - len(end)
    text = texts.read_text(tokenizer, "pydocs").ids.tolist()
    at = int(0.35 * room)
    return torch.tensor([[*start, *text[:at], *needle, *text[at:room], *end]]), len(start) + at


def answer(model, tokenizer, ids) -> str:
    """Return the words with which the model goes on."""
    import torch

    out = model.generate(
        ids.to(model.device),
        attention_mask=torch.ones_like(ids, device=model.device),
        max_new_tokens=NEW,
        do_sample=False,
    )
    text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return " ".join(text.split())


def called(method: str) -> str:
    """Name a method for a reader."""
    return "unmodified" if method == "rope" else method


def said(words: str) -> str:
    """Quote an answer. An unmodified model's has often no word in it: that is no fault of ours."""
    return repr(words) if any(map(str.isalnum, words)) else f"no words at all: {words!r}"


def ruler_of_all() -> str:
    """Return what RULER found over its texts of this length, from the kept results."""
    import ruler
    from harness import RESULTS

    from extrope_kernels.evaluation import report

    cells = {cell.key[3:]: cell for cell in ruler.read(RESULTS / "ruler" / "smollm2.csv")
             if (cell.task, cell.length) == (ruler.TASKS[0], LENGTH)}  # fmt: skip
    parts = []
    for method, params in (*METHODS.items(), ("yarn", {"factor": 4.0})):
        scores = cells[ruler.names(method, params)].scores
        name = report.name_of(called(method), params)
        parts.append(f"{name} {sum(scores):.0f} of {len(scores)}")
    return (
        f"RULER's easiest task, niah_single_1, over more texts: {', '.join(parts)}\n"
        "   (docs/guide/measured.md)."
    )


def draw_curves() -> None:
    """Measure loss and recall under their methods, and draw both."""
    import evaluations
    import plots

    from extrope_kernels.evaluation import evaluate, packages

    print(f"\n2. Curves, in nats a token, from {READINGS} readings of the Python reference.")
    began, found = time.monotonic(), {}
    for task, methods in CURVES.items():
        print(f"\n   {task}, {len(methods)} readings:", flush=True)
        measured = evaluate(
            packages.SMOLLM2, methods, LENGTH, task=task, trials=1, out=OUT, table=sys.stdout
        )
        found[task] = evaluations.compact(measured, {"loss": "demo", "recall": "gains"}[task])
    plots.save(plots.draw_demo(**found), OUT / "demo.png")
    print(f"\nDone in {(time.monotonic() - began) / 60:.1f} minutes: {OUT / 'demo.png'}")


if __name__ == "__main__":
    sys.exit(main())
