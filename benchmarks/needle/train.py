"""Trains the small GLM-4 model that finds needles in long text, and writes it to a folder.

One GPU in bf16, or a CPU in fp32 (toy sizes). The plan (lengths, learning rate) follows the share
of the time budget (``--minutes``) or of ``--steps`` that has passed; batches depend on the seed and
the step only, so ``--resume`` goes on where a run stopped. At the end every task is asked at a few
lengths, dense and greedy, and the table is printed last.

    python benchmarks/needle/train.py --out needle --minutes 7
    python benchmarks/needle/train.py --out needle --minutes 7 --pause 3.5    # first half
    python benchmarks/needle/train.py --out needle --minutes 7 --resume       # second half
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from needle_data import ANSWER, FAMILIES, TEXT, Source
from needle_model import HORIZON, build_model, fast_norms
from needle_package import tasks
from needle_scores import evaluate, table
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "python" / "sparseattn" / "models" / "needle"
TEXT_WEIGHT = 0.2  # of the loss on text, beside the answers'
SCORED = 2  # one label in so many goes through the output layer: all answers, and some text
MIXTURE = (0.25, 0.25, 0.15, 0.20, 0.15)  # of needle_data.FAMILIES without the pairs
LOG_EVERY = 50


@dataclass(frozen=True)
class Phase:
    """What is trained on until ``until`` (a share of the budget) has passed."""

    until: float
    lengths: dict[int, float]  # length -> weight
    tokens: int  # per step
    crowded: float  # share of the steps whose sequences are full of pieces
    pairs: float  # share of the sequences that are pairs


PHASES = (
    Phase(0.04, {512: 1.0}, 32768, 1.0, 0.5),
    Phase(0.14, {512: 1.0, 1024: 2.0, 2048: 1.0}, 65536, 0.7, 0.15),
    Phase(0.35, {1024: 1.0, 2048: 2.0, 8192: 2.0}, 131072, 0.5, 0.05),
    Phase(0.65, {1024: 1.0, 2048: 2.0, 8192: 4.0, 32768: 3.0}, 131072, 0.4, 0.03),
    Phase(1.01, {2048: 1.0, 8192: 3.0, 32768: 3.0, 65536: 1.0, 131072: 0.5}, 131072, 0.4, 0.03),
)


class Trainer:
    """The model, its optimiser on fp32 copies of the weights, and the step."""

    def __init__(self, args: argparse.Namespace) -> None:
        from transformers import AutoTokenizer

        self.args = args
        self.device = torch.device(args.device)
        self.tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, local_files_only=True)
        torch.manual_seed(args.seed)
        self.model = build_model(args, len(self.tokenizer), self.tokenizer.eos_token_id)
        turns = self.model.model.rotary_emb
        frequencies = turns.inv_freq.clone()
        self.model.to(self.device, torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        turns.inv_freq = frequencies.to(self.device)  # fp32, as a loaded model has them
        fast_norms(self.model)
        self.weights = list(self.model.parameters())
        self.master = [w.detach().float().clone() for w in self.weights]
        for m in self.master:
            m.grad = torch.zeros_like(m)
        decay = [m for m in self.master if m.dim() > 1]
        plain = [m for m in self.master if m.dim() <= 1]
        self.optimiser = torch.optim.AdamW(
            [{"params": decay, "weight_decay": args.decay}, {"params": plain, "weight_decay": 0.0}],
            lr=args.lr,
            betas=(0.9, args.beta2),
            fused=True,
        )
        text = tasks.haystack_text()[tasks.topics_length() :]  # the topics are left for evaluation
        ids = tasks._Tokens(self.tokenizer)(text[: args.text_bytes])
        self.source = Source(self.tokenizer, torch.tensor(ids, device=self.device), args.seed)
        if args.compile:
            torch._dynamo.config.recompile_limit = 64  # the plan has about ten shapes
            for layer in self.model.model.layers:
                layer.compile(dynamic=False)
        self.step, self.seconds, self.tokens = 0, 0.0, 0
        self.curve: list[dict[str, Any]] = []
        self.sums = torch.zeros(ANSWER + len(FAMILIES), 3, device=self.device)

    def progress(self) -> float:
        if self.args.steps:
            return self.step / self.args.steps
        return self.seconds / (60 * self.args.minutes)

    def phase(self) -> Phase:
        passed = self.progress()
        return next((p for p in PHASES if passed < p.until), PHASES[-1])

    def rate(self) -> float:
        """Warm-up by steps, constant, then down to nearly nothing."""
        args = self.args
        warm = min(1.0, (self.step + 1) / args.warmup)
        left = (1 - self.progress()) / args.cooldown
        return args.lr * warm * max(0.02, min(1.0, left))

    def sizes(self) -> tuple[int, int, tuple[float, ...], bool]:
        """(rows, length, mixture, crowded) of the next step."""
        phase = self.phase()
        draw = torch.Generator().manual_seed(self.args.seed * 7_000_003 + self.step)
        lengths = list(phase.lengths)
        weights = torch.tensor([phase.lengths[n] for n in lengths], dtype=torch.float64)
        length = lengths[int(torch.multinomial(weights, 1, generator=draw))]
        length = min(length, self.args.max_length)
        tokens = self.args.tokens or phase.tokens
        crowded = float(torch.rand((), generator=draw)) < phase.crowded
        pairs = phase.pairs if self.args.pairs is None else self.args.pairs
        total = sum(self.args.mixture)
        others = tuple(w / total * (1 - pairs) for w in self.args.mixture)
        return max(1, tokens // length), length, (*others, pairs), crowded

    def positions(self, length: int) -> torch.Tensor:
        """0, 1, 2, ...; later in training often with jumps, so that short sequences show the
        distances of long ones."""
        at = torch.arange(length, device=self.device)
        draw = torch.Generator().manual_seed(self.args.seed * 11_000_003 + self.step)
        u = torch.rand(2, generator=draw).tolist()
        room = self.args.horizon - length
        if self.progress() < self.args.jumps_from or u[0] < 0.5 or room <= 0:
            return at[None]
        count = 1 + int(4 * u[1])
        share = torch.rand(count + 1, generator=draw)
        jumps = (share[:count] / share.sum() * room).long().tolist()
        where = torch.randint(length, (count,), generator=draw).tolist()
        # numbers, not tensors: a copy to the device would wait for it
        return sum(((at >= w) * jump for w, jump in zip(where, jumps, strict=True)), at)[None]

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Hidden states after the last norm. What the model does without its look at the
        positions, where jumps would pass for packed sequences: no mask, attention is causal."""
        inner = self.model.model
        hidden = inner.embed_tokens(ids)
        turns = inner.rotary_emb(hidden, position_ids=positions)
        backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
        if self.device.type == "cpu":
            backends.append(SDPBackend.MATH)
        with sdpa_kernel(backends):
            for layer in inner.layers:
                hidden = layer(hidden, attention_mask=None, position_embeddings=turns)
        return inner.norm(hidden)

    def train_step(self) -> int:
        """Returns the number of tokens."""
        rows, length, mixture, crowded = self.sizes()
        ids, kinds = self.source.make(self.step, rows, length, mixture, crowded)
        hidden = self.forward(ids[:, :-1], self.positions(length)).flatten(0, 1)
        loss = self.loss(hidden, ids[:, 1:].flatten(), kinds.flatten())
        loss.backward()
        grads = [m.grad for m in self.master]
        torch._foreach_copy_(grads, [w.grad for w in self.weights])
        for w in self.weights:
            w.grad = None
        torch.nn.utils.clip_grad_norm_(self.master, self.args.clip, foreach=True)
        rate = self.rate()
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.master)
        self.step += 1
        self.tokens += rows * length
        return rows * length

    def loss(self, hidden: torch.Tensor, labels: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
        """Answers' cross-entropy, families weighted by the root of their counts, and a little of
        the text's. Labels that matter are picked by a top-k of fixed size: no host sync."""
        wish = (kinds >= ANSWER) * 2.0 + (kinds == TEXT) * 1.0
        wish += torch.rand(wish.shape, generator=self.source._draw, device=self.device)
        picked = wish.topk(max(1, len(labels) // SCORED), sorted=False).indices
        labels, kinds = labels[picked], kinds[picked]
        logits = self.model.lm_head(hidden.index_select(0, picked)).float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        counts = torch.zeros(len(self.sums), device=self.device)
        counts.index_add_(0, kinds, torch.ones_like(losses))
        sums = torch.zeros_like(counts).index_add(0, kinds, losses)
        with torch.no_grad():
            hits = torch.zeros_like(counts)
            hits.index_add_(0, kinds, (logits.argmax(-1) == labels).float())
            self.sums += torch.stack((counts, sums, hits), 1)
        means = sums / counts.clamp(min=1)
        roots = counts[ANSWER:].sqrt()
        answers = (means[ANSWER:] * roots).sum() / roots.sum().clamp(min=8)  # few: less weight
        return answers + self.args.text_weight * means[TEXT]

    def log(self) -> dict[str, Any]:
        """Adds what passed since the last log to the curve. Waits for the device."""
        count, loss, hits = self.sums.cpu().T.tolist()
        self.sums.zero_()
        answers = range(ANSWER, len(count))
        total = max(1.0, sum(count[i] for i in answers))
        entry = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 2),
            "rate": self.rate(),
            "answer_loss": sum(loss[i] for i in answers) / total,
            "answer_accuracy": sum(hits[i] for i in answers) / total,
            "text_loss": loss[TEXT] / max(1.0, count[TEXT]),
            "accuracy": {
                FAMILIES[i - ANSWER]: round(hits[i] / count[i], 4) for i in answers if count[i]
            },
        }
        if not entry["answer_loss"] < 1e4:
            raise FloatingPointError(f"the loss is {entry['answer_loss']} at step {self.step}")
        self.curve.append(entry)
        return entry

    def save(self, path: Path) -> None:
        state = {
            "master": self.master,
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "curve": self.curve,
            "sums": self.sums,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        with torch.no_grad():
            torch._foreach_copy_(self.master, state["master"])
            torch._foreach_copy_(self.weights, self.master)
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.seconds, self.tokens = state["step"], state["seconds"], state["tokens"]
        self.curve = state["curve"]
        self.sums.copy_(state["sums"])


def train(trainer: Trainer, checkpoint: Path) -> bool:
    """Until the budget is spent (True) or ``--pause`` minutes of this run are (False)."""
    args = trainer.args
    begun = time.perf_counter()
    before, saved = trainer.seconds, begun
    total = args.steps or round(60 * args.minutes)
    bar = tqdm(
        total=total,
        initial=trainer.step if args.steps else round(before),
        unit="step" if args.steps else "s",
        mininterval=5.0 if trainer.device.type == "cuda" else 1.0,
        disable=args.quiet,
    )
    last, tokens, since = trainer.tokens, 0, begun
    while trainer.progress() < 1:
        tokens += trainer.train_step()
        now = time.perf_counter()
        if trainer.step % LOG_EVERY == 0:
            trainer.seconds = before + now - begun
            entry = trainer.log()
            now = time.perf_counter()
            bar.set_postfix_str(
                f"step {trainer.step} {tokens / (now - since) / 1e3:.0f}K tok/s "
                f"loss {entry['answer_loss']:.3f} acc {entry['answer_accuracy']:.3f} "
                + " ".join(f"{k[:4]} {v:.2f}" for k, v in entry["accuracy"].items()),
                refresh=False,
            )
            if args.verbose:
                bar.write(json.dumps(entry))
            tokens, since = 0, now
        trainer.seconds = before + now - begun
        bar.update((trainer.step if args.steps else round(trainer.seconds)) - bar.n)
        if now - saved > 60:
            trainer.save(checkpoint)
            saved = now
        if args.pause and now - begun > 60 * args.pause:
            break
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    trainer.seconds = before + time.perf_counter() - begun
    bar.close()
    trainer.save(checkpoint)
    spent = max(1e-9, trainer.seconds - before)
    print(
        f"{trainer.step} steps, {trainer.tokens / 1e6:.1f}M tokens, {trainer.seconds:.0f} s; "
        f"this run {(trainer.tokens - last) / spent / 1e3:.0f}K tokens/s"
    )
    return trainer.progress() >= 1


def write(trainer: Trainer, out: Path, scores: dict[str, dict[str, float]] | None) -> None:
    """model.safetensors, config.json, the tokenizer's files, loss.json."""
    args = trainer.args
    copy.deepcopy(trainer.model).to(torch.bfloat16).save_pretrained(out)
    (out / "generation_config.json").unlink(
        missing_ok=True
    )  # says nothing that config.json doesn't
    trainer.tokenizer.save_pretrained(out)
    record = {
        "seed": args.seed,
        "steps": trainer.step,
        "tokens": trainer.tokens,
        "minutes": round(trainer.seconds / 60, 2),
        "device": torch.cuda.get_device_name() if trainer.device.type == "cuda" else "CPU",
        "parameters": sum(w.numel() for w in trainer.weights),
        "arguments": {
            k: v for k, v in vars(args).items() if not isinstance(v, Path) and k not in ("resume",)
        },
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "dense_scores": scores,
        "curve": trainer.curve,
    }
    (out / "loss.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the model")
    add("--checkpoint", type=Path, help="file for the state (default: OUT.ckpt beside OUT)")
    add("--resume", action="store_true", help="go on from the checkpoint")
    add("--minutes", type=float, default=7.0, help="budget of all runs together")
    add("--steps", type=int, help="budget in steps instead")
    add("--pause", type=float, help="stop this run after so many minutes, to be resumed")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--tokenizer", type=Path, default=TOKENIZER)
    add("--text-bytes", type=int, default=4_000_000, help="of the training text")
    for name, size in (("layers", 5), ("hidden", 256), ("mlp", 640), ("heads", 8)):
        add(f"--{name}", type=int, default=size)
    add("--kv-heads", type=int, default=2)
    add("--head-dim", type=int, default=64)
    add("--theta", type=float, default=5e5, help="base of RoPE's frequencies")
    add("--local-layers", type=int, default=1, help="layers that start with local heads")
    add("--local-strength", type=float, default=7.0, help="how local; 0: not")
    add("--lr", type=float, default=2e-3)
    add("--beta2", type=float, default=0.98)
    add("--decay", type=float, default=0.01)
    add("--clip", type=float, default=1.0)
    add("--warmup", type=int, default=200, help="steps")
    add("--cooldown", type=float, default=0.35, help="share of the budget with falling rate")
    add("--text-weight", type=float, default=TEXT_WEIGHT)
    add(
        "--mixture",
        type=float,
        nargs=len(MIXTURE),
        default=MIXTURE,
        metavar="W",
        help=", ".join(FAMILIES[:-1]),
    )
    add("--pairs", type=float, help="share of sequences of pairs, instead of the plan's")
    add("--tokens", type=int, help="per step, instead of the plan's")
    add("--max-length", type=int, default=HORIZON, help="cuts the plan's lengths")
    add("--horizon", type=int, default=HORIZON, help="positions that jumps reach")
    add("--jumps-from", type=float, default=0.35, help="share of the budget before positions jump")
    add("--compile", action="store_true", help="torch.compile the layers")
    add("--eval-lengths", type=int, nargs="*", default=[1024, 8192, 32768, 65536, 131072])
    add("--eval-examples", type=int, default=16)
    add("--quiet", action="store_true", help="no progress bar")
    add("--verbose", action="store_true", help="print every entry of the curve")
    args = parser.parse_args(argv)
    args.mixture = tuple(args.mixture)
    args.checkpoint = args.checkpoint or args.out.with_name(args.out.name + ".ckpt")
    return args


def main(argv: Sequence[str] | None = None) -> Trainer:
    args = parse(argv)
    trainer = Trainer(args)
    if args.resume:
        trainer.load(args.checkpoint)
    count = sum(w.numel() for w in trainer.weights)
    print(f"{count / 1e6:.2f}M parameters, {len(trainer.source.text)} tokens of text")
    finished = train(trainer, args.checkpoint)
    if trainer.device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    write(trainer, args.out, None)
    if args.eval_lengths:
        begun = time.perf_counter()
        scores = evaluate(
            trainer.model.eval(), trainer.tokenizer, args.eval_lengths, args.eval_examples, 1
        )
        write(trainer, args.out, scores)
        print(
            f"evaluated in {time.perf_counter() - begun:.0f} s; {args.eval_examples} examples each"
        )
        print(table(scores))
    if not finished:
        print(f"paused at {100 * trainer.progress():.0f} %: go on with --resume")
    return trainer


if __name__ == "__main__":
    main()
