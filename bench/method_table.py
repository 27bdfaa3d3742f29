"""The README's table of methods, with what each came to: see readme.py."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Method(NamedTuple):
    function: str
    what: str
    source: str  # a paper's number, or words and a link
    test: str  # the file below tests/ that is about it
    trained: str = ""  # its row in length_generalization, or none
    demo: str = ""  # its row in the demo, or none


METHODS = (
    Method("rope", "base^(-2i/d)", "2104.09864", "methods", "rope", "rope"),
    Method("abf", "base 500,000", "2309.16039", "methods", "abf, tuned"),
    Method("pi", "all frequencies divided by the factor", "2306.15595", "methods", "pi", "pi"),
    Method("ntk_aware", "base grows by factor^(d/(d-2))",
           "[bloc97](https://www.reddit.com/r/LocalLLaMA/comments/14lz7j5/)", "methods",
           "ntk_aware", "ntk_aware"),
    Method("dynamic_ntk", "as above, by the current length",
           "[emozilla](https://www.reddit.com/r/LocalLLaMA/comments/14mrgpr/)", "methods_seq_len",
           "dynamic_ntk"),
    Method("ntk_by_parts", "fast pairs kept, slow ones interpolated", "2309.00071", "methods",
           "ntk_by_parts", "ntk_by_parts"),
    Method("ntk_mixed", "the factor spread over the pairs",
           "[Su 9706](https://kexue.fm/archives/9706)", "methods", "ntk_mixed"),
    Method("yarn", "by parts, and attention sharpened", "2309.00071", "methods", "yarn", "yarn"),
    Method("dynamic_yarn", "as above, by the current length", "2309.00071", "methods_seq_len",
           "dynamic_yarn"),
    Method("giraffe_power", "slow pairs slowed by a power", "2308.10882", "methods",
           "giraffe_power"),
    Method("giraffe_truncation", "slow pairs cut", "2308.10882", "methods", "giraffe_truncation"),
    Method("xpos", "amplitude decays with distance", "2212.10554", "rope_decay", "xpos"),
    Method("llama3", "by parts, linear in turns", "2407.21783", "methods", "llama3"),
    Method("longrope", "searched factor per pair, two sets", "2402.13753", "methods"),
    Method("proportional", "slowest pairs do not turn (p-RoPE)", "2410.06205", "methods"),
    Method("with_sections", "a position axis per frequency (mRoPE)", "2409.12191", "mrope"),
    Method("rerope_attention", "i - j, at most the window",
           "[Su 9708](https://kexue.fm/archives/9708)", "rerope", "rerope", "rerope"),
    Method("... factor=k", "past the window k times slower (Leaky)",
           "[Su 9708](https://kexue.fm/archives/9708)", "rerope", "leaky_rerope", "leaky_rerope"),
    Method("... factor<1", "trained so, run as RoPE (InvLeaky)",
           "[Su 9728](https://kexue.fm/archives/9728)", "rerope", "inverse_leaky"),
    Method("... grouped=True", "past the window in groups (SelfExtend)", "2401.01325", "rerope",
           "self_extend"),
    Method("dual_chunk_attention", "within chunks, older ones at a cap", "2402.17463",
           "dual_chunk", "dual_chunk"),
    Method("blockwise_causal_attention", "own and previous half block (LEX)", "2212.10554",
           "blockwise_causal", "xpos, blockwise (LEX)"),
    Method("permuteformer_attention", "powers of permutations, linear attention", "2109.02377",
           "permuteformer", "permuteformer"),
    Method("positions.shape", "the sequence moved as a whole", "2109.05644", "positions", "shape"),
    Method("positions.random_padding", "padding before it", "2305.04859", "positions",
           "random_padding"),
    Method("positions.randomized", "a sorted random choice", "2305.16843", "positions_randomized",
           "randomized"),
    Method("positions.pose", "a skip between two spans", "2309.10400", "positions"),
    Method("positions.giraffe_randomized", "random real steps", "2308.10882", "positions"),
)  # fmt: skip


def rows(length: dict, demo: dict | None) -> list[list[str]]:
    """Function, description, source, test, loss at the longest, loss in the demo's last bucket."""
    trained = {row["name"]: f"{row['lengths'][-1]['last']:.2f}" for row in length["rows"]}
    read = {row["method"]: row["buckets"] for row in demo["rows"]} if demo else {}
    return [
        [
            f"`{method.function}`",
            method.what,
            _link(method.source),
            f"[test]({_test(method.test)})",
            trained[method.trained] + " (tuned)" * ("tuned" in method.trained)
            if method.trained
            else "",
            f"{read[method.demo][-1]['loss']:.2f}" if method.demo in read else "",
        ]
        for method in METHODS
    ]


def _test(name: str) -> Path:
    return next((ROOT / "tests").rglob(f"test_{name}.py")).relative_to(ROOT)


def _link(source: str) -> str:
    number = source.replace(".", "").isdigit()
    return f"[{source}](https://arxiv.org/abs/{source})" if number else source
