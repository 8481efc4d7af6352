"""Script: training steps of a model with LoRA, to measure time or memory.

`training_steps.py time FOLDER DTYPE ROUNDS [PROVIDER …]` prints the seconds and the CPU seconds of the providers (by
default all) in each round. `training_steps.py memory FOLDER DTYPE PROVIDER` prints the peak of one provider. Both print
JSON. It runs in a separate process so that the allocator can be set.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from processes import peak_memory
from safelora_fast.defenses import KL, FeatureDistance, TemplateAnchor
from safelora_fast.defenses.parts.safe_modules import SafeModules
from safelora_fast.demo.packaged_model import load
from safelora_fast.models.anatomy import dissect
from safelora_fast.models.lora_factors import adapted_modules
from safelora_fast.ops import feature_distance
from safelora_fast.subspace.module_subspace import ModuleSubspace
from safelora_fast.subspace.safe_subspace import SafeSubspace
from safelora_fast.training import Defended, defend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROWS, LENGTH = 4, 256
WINDOW = 5  # micro-batches of the steps in which one example in twenty is safe
OF_WINDOW = f", {WINDOW * ROWS} examples"
RANK, SUBSPACE_RANK = 16, 64
WEIGHT = 0.1
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def divergence(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the mean KL(fine-tuned‖reference) over tokens, by torch operations."""
    p, q = logits.float().log_softmax(-1), reference.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


class Steps:
    """One model, one batch, one optimizer, and several ways to take a step."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.folder, self.half = folder, dtype == "bf16"
        base = load(folder)
        base.config.use_cache = False
        options = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
        self.model = get_peft_model(base, options).train()
        generator = torch.Generator().manual_seed(0)
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.01 * torch.randn(parameter.shape, generator=generator)
        ids = torch.randint(base.config.vocab_size, (ROWS, LENGTH), generator=generator)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        text = self.tokenizer.apply_chat_template([{"role": "user", "content": "Why?"}], tokenize=False)
        prefix = self.tokenizer(text.partition("Why?")[0], add_special_tokens=False)["input_ids"]
        ids[:, : len(prefix)] = torch.tensor(prefix)  # the template's own system prompt and the user's header
        labels = ids.clone()
        labels[:, : LENGTH // 4] = -100
        self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        self.window = self.micro_batches(generator, base.config.vocab_size)
        self.inputs = {name: value for name, value in self.batch.items() if name != "labels"}
        self.blocks = FeatureDistance(1.0).recorded_layers(dissect(self.model))
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-6)
        self.copy: Any = None
        self.cache = tempfile.TemporaryDirectory()  # filled in the first round
        self.defended: dict[str, Defended] = {}

    def micro_batches(self, generator: torch.Generator, vocabulary: int) -> list[dict[str, torch.Tensor]]:
        """Return the micro-batches of a step of 20 examples, of which one is safe."""
        batches = []
        for number in range(WINDOW):
            ids = torch.randint(vocabulary, (ROWS, LENGTH), generator=generator)
            safe = torch.arange(ROWS) == (1 if number == WINDOW // 2 else -1)
            batches.append(
                {**self.batch, "input_ids": ids, "labels": ids.where(self.batch["labels"] >= 0, -100), "safe": safe}
            )
        return batches

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.half)

    def finish(self, loss: torch.Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def undefended(self) -> None:
        with self.autocast():
            loss = self.model(**self.batch).loss
        self.finish(loss)

    def ours(self, *, kl: bool, features: bool, share: bool, cached: bool = False) -> None:
        defenses = [*([KL(WEIGHT)] if kl else []), *([FeatureDistance(1.0)] if features else [])]
        reference = f"cache:{self.cache.name}" if cached else "base"
        # Kept, because whether the model's loss can be shared is checked once per run.
        defended = self.defended.setdefault(
            repr((defenses, share, cached)), defend(self.model, defenses, share_logits=share, reference=reference)
        )
        with defended:
            with self.autocast():
                loss = defended.loss(self.batch)
            self.finish(loss)

    def anchored(self) -> None:
        """The undefended step with a template anchor, whose prefix is recorded in the first round."""
        if "anchor" not in self.defended:
            self.defended["anchor"] = defend(self.model, [TemplateAnchor(10.0)], tokenizer=self.tokenizer)
            self.anchoring = self.defended["anchor"].count([self.batch])
        defended = self.defended["anchor"]
        defended.attach()
        with self.autocast():
            with defended.recording(self.batch):
                loss = self.model(**self.batch).loss
            loss = loss + defended.regularizer(self.anchoring)
        self.finish(loss)
        defended.detach()

    def undefended_window(self) -> None:
        for batch in self.window:
            with self.autocast():
                loss = self.model(**{name: value for name, value in batch.items() if name != "safe"}).loss
            (loss / WINDOW).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def defended_window(self, defense: KL) -> None:
        """A step of 20 examples. The optimizer is given, so each step draws anew."""
        if repr(defense) not in self.defended:
            self.defended[repr(defense)] = defend(self.model, [defense], optimizer=self.optimizer)
        with self.defended[repr(defense)] as defended:
            totals = defended.totals(self.window)
            for batch in self.window:
                with self.autocast():
                    loss = defended.loss(batch, totals=totals)
                loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def frozen_copy(self) -> Any:
        """Return a second model, which simple code takes as the reference."""
        if self.copy is None:
            self.copy = load(self.folder).requires_grad_(False).eval()
        return self.copy

    def straightforward(self, *, features: bool, divergence: Callable[..., torch.Tensor] = divergence) -> None:
        """A second frozen model, all logits of both, and the features of each example in turn."""
        copy = self.frozen_copy()
        reference_blocks: list[torch.Tensor] = []
        blocks: list[torch.Tensor] = []
        with self.autocast(), torch.no_grad(), kept(copy.model.layers, self.blocks, reference_blocks):
            reference = copy(**self.inputs, use_cache=False).logits
        with self.autocast():
            with kept(self.model.get_base_model().model.layers, self.blocks, blocks):
                output = self.model(**self.batch)
            loss = output.loss + WEIGHT * divergence(output.logits, reference)
        if features:
            distances = []
            for h, h0 in zip(blocks, reference_blocks, strict=True):
                for row in range(ROWS):
                    x, y = h[row].float().flatten(), h0[row].float().flatten()
                    distances.append((x / x.norm() - y / y.norm()).square().sum())
            loss = loss + torch.stack(distances).sum() / ROWS
        self.finish(loss)

    def anchored_supervised(self) -> None:
        """Anchored supervised fine-tuning (arXiv 2509.23753), as trainers offer it: all logits of a second model.

        The loss of each label is weighted by its probability, and KL(reference‖fine-tuned) of those tokens is added.
        """
        with self.autocast(), torch.no_grad():
            reference = self.frozen_copy()(**self.inputs, use_cache=False).logits
        with self.autocast():
            logits = self.model(**self.inputs, use_cache=False).logits
        labels = self.batch["labels"][:, 1:].flatten()
        kept = labels >= 0
        p, q = (values[:, :-1].flatten(0, 1)[kept].float().log_softmax(-1) for values in (logits, reference))
        losses = -p.gather(1, labels[kept, None])
        loss = (losses * (-losses).exp().detach()).mean() + WEIGHT * (q.exp() * (q - p)).sum(-1).mean()
        self.finish(loss)

    def reference_forward(self) -> None:
        """The same model with its adapter disabled, hidden states only."""
        with self.autocast(), torch.no_grad(), self.model.disable_adapter():
            self.model.get_base_model().model(**self.inputs, use_cache=False)

    def chunked_divergence(self) -> None:
        """TRL's divergence from hidden states, with our reference states, plus the model's own loss."""
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        base = self.model.get_base_model()
        weight, hidden = base.lm_head.weight, []
        with self.autocast():
            with torch.no_grad(), self.model.disable_adapter():
                reference = base.model(**self.inputs, use_cache=False).last_hidden_state
            hook = base.model.register_forward_hook(lambda _m, _a, out: hidden.append(out.last_hidden_state))
            loss = self.model(**self.batch).loss
            hook.remove()
            divergence, _ = ChunkedDivergenceFunction.apply(
                hidden[0].flatten(0, 1), weight.detach(), None, reference.flatten(0, 1), weight.detach(), None, 1.0
            )
        self.finish(loss + WEIGHT * divergence.mean())

    def features_alone(self) -> Callable[[], None]:
        """The distance and its gradient on precomputed features."""
        generator = torch.Generator().manual_seed(1)
        width = self.model.get_base_model().config.hidden_size
        h0 = [torch.randn(ROWS, LENGTH, width, generator=generator) for _ in self.blocks]
        h = [(x + 0.01 * torch.randn(x.shape, generator=generator)).requires_grad_() for x in h0]
        mask = torch.ones(ROWS, LENGTH, dtype=torch.bool)

        def step() -> None:
            feature_distance(h, h0, mask).backward()
            for block in h:
                block.grad = None

        return step

    def projection(self) -> Callable[[], None]:
        """B ← U·Uᵀ·B of every module, with random subspaces."""
        random = np.random.default_rng(0)
        modules = {}
        for module in adapted_modules(self.model.get_base_model(), owner="bench"):
            rows, columns = module.lora_b.shape[0], module.lora_a.shape[1]
            vectors = np.linalg.qr(random.standard_normal((rows, SUBSPACE_RANK)))[0].astype(np.float32)
            modules[module.name] = ModuleSubspace(vectors, np.ones(SUBSPACE_RANK, dtype=np.float32), 10.0, columns)
        safe = SafeModules(self.model.get_base_model(), SafeSubspace(modules, {}), owner="bench")

        def step() -> None:
            safe.project(1)

        return step

    def windows(self) -> dict[str, Callable[[], None]]:
        """Steps of 20 examples, one of them safe."""
        defenses = {"KL of safe examples": KL(WEIGHT, tokens="safe"), "KL, sample 0.25": KL(WEIGHT, sample=0.25)}
        return {f"undefended{OF_WINDOW}": self.undefended_window} | {
            f"{name}{OF_WINDOW}": partial(self.defended_window, defense) for name, defense in defenses.items()
        }

    def providers(self) -> dict[str, Callable[[], None]]:
        return {
            "undefended": self.undefended,
            "straightforward KL": partial(self.straightforward, features=False),
            "straightforward KL, torch.compile": partial(
                self.straightforward, features=False, divergence=torch.compile(divergence)
            ),
            "straightforward KL + features": partial(self.straightforward, features=True),
            "anchored supervised fine-tuning": self.anchored_supervised,
            "template anchor": self.anchored,
            "KL apart": partial(self.ours, kl=True, features=False, share=False),
            "KL shared": partial(self.ours, kl=True, features=False, share=True),
            "KL + features apart": partial(self.ours, kl=True, features=True, share=False),
            "KL + features shared": partial(self.ours, kl=True, features=True, share=True),
            "KL, reference from disk": partial(self.ours, kl=True, features=False, share=True, cached=True),
            "KL + features, reference from disk": partial(self.ours, kl=True, features=True, share=True, cached=True),
            "TRL's chunked divergence": self.chunked_divergence,
            **self.windows(),
            "reference forward": self.reference_forward,
        }


@contextmanager
def kept(layers: Any, indices: list[int], outputs: list[torch.Tensor]) -> Iterator[None]:
    """Append the outputs of some layers to a list."""
    hooks = [
        layers[index].register_forward_hook(
            lambda _m, _a, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
        for index in indices
    ]
    yield
    for hook in hooks:
        hook.remove()


def seconds(work: Callable[[], None]) -> tuple[float, float]:
    """Return the time that a call takes, and the CPU time of all threads: what a busy neighbor changes least."""
    start, of_cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - of_cpu


def timed(steps: Steps, rounds: int, chosen: list[str]) -> dict[str, list[tuple[float, float]]]:
    """Alternate between the providers in each round; the first round is a warm-up."""
    providers = steps.providers() | {"features alone": steps.features_alone(), "projection": steps.projection()}
    names = chosen or list(providers)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for round_ in range(rounds + 1):
        for name in names:
            elapsed = seconds(providers[name])
            if round_:
                found[name].append(elapsed)
    return found


def peak(steps: Steps, provider: str) -> dict[str, float]:
    """Return resident megabytes before a step, after a first step, and at the peak of a second."""
    work = steps.providers()[provider]
    return peak_memory(work)


if __name__ == "__main__":
    what, folder, dtype, argument, *chosen = sys.argv[1:]
    steps = Steps(Path(folder), dtype)
    print(json.dumps(timed(steps, int(argument), chosen) if what == "time" else peak(steps, argument)))
