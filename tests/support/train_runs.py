"""One training run, in this process or on two; as a script it is one of the two: `train_runs.py SPEC.json OUTPUT.pt`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from accelerate import debug_launcher
from tiny_models import VOCABULARY, adapter_weights, collate, random_subspace, rows, tiny_peft_model
from two_processes import in_one_process, in_two_processes

from safelora_fast.data.chat import ANSWERS
from safelora_fast.data.template_tokens import QUESTIONS
from safelora_fast.data.template_tokens import SYSTEMS as SYSTEM_TEXTS
from safelora_fast.defenses import KL, DriftMonitor, FeatureDistance, SafeLora, SubspacePenalty, TemplateAnchor
from safelora_fast.subspace.safe_subspace import SafeSubspace
from safelora_fast.training import defend

LENGTHS = [7, 3, 9, 4, 6, 5, 8, 3]
SYSTEMS = [0, 0, 1, 0, 0, 2, 0, 0]  # of two processes with micro-batches of two, only one meets a new one in its second
USER = 5  # the user's header


def defenses(weights, model):
    """Create the defenses of a spec, which maps names to λ. For "safelora" the value is the interval between projections.

    The value of "safelora_end" contains aligned, base and options of a projection at the end.
    """
    made = []
    if "kl" in weights:
        made.append(KL(weights["kl"], tokens=weights.get("kl_tokens", "all")))
    if "safe_kl" in weights:
        made.append(KL(weights["safe_kl"], tokens="safe"))
    if "feature_distance" in weights:
        made.append(FeatureDistance(weights["feature_distance"], layers=2, tokens="completion"))
    if "template_anchor" in weights:
        made.append(TemplateAnchor(weights["template_anchor"]))
    if "subspace_penalty" in weights:
        made.append(SubspacePenalty(random_subspace(model), weights["subspace_penalty"]))
    if "safelora" in weights:
        made.append(SafeLora(random_subspace(model, rank=20, seed=1), at="step", every=weights["safelora"]))
    if "safelora_end" in weights:
        given = weights["safelora_end"]
        subspace = SafeSubspace.from_sources(aligned=given["aligned"], base=given["base"])
        made.append(SafeLora(subspace, at="end", **given.get("options", {})))
    return made


def examples_of(spec):
    """Return the examples of a spec; if they are tagged, every third one is safe.

    With a template anchor, each begins with one of three systems and the user's header.
    """
    examples = rows(spec.get("lengths", LENGTHS))
    for number, example in enumerate(examples if spec.get("tagged") else []):
        tag = number % 3 == 1
        example["safe"] = [tag] * len(example["input_ids"]) if spec["tagged"] == "by token" else tag
    for system, example in zip(SYSTEMS, examples, strict=False):
        if "template_anchor" in spec.get("defenses", {}):
            example["input_ids"][:2] = [10 + system, USER]
    return examples


def window_of(spec):
    """Return this process's micro-batches of a step. The examples in `silent_rows` have no labels."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    examples = examples_of(spec)
    for index in spec.get("silent_rows", []):
        examples[index]["labels"] = [-100] * len(examples[index]["labels"])
    examples = examples[rank::world]
    return [collate(examples[start : start + spec["batch"]]) for start in range(0, len(examples), spec["batch"])]


def settings(spec):
    """Return the other keyword arguments for loops and trainers; they always include a monitor."""
    return {
        **({} if spec["kind"] in {"transformers", "trl"} else {"tokenizer": tiny_tokenizer()}),
        "reference": spec.get("reference", "base"),
        "share_logits": spec.get("share_logits", True),
        "on_nonfinite": spec.get("on_nonfinite", "raise"),
        "monitors": [DriftMonitor(torch.linspace(-1, 2, 32), 1)],
    }


def trl_fuses_the_head():
    """Whether this TRL version computes its metrics without the logits (older ones read the logits)."""
    try:
        from trl.trainer.utils import add_fused_lm_head  # noqa: F401
    except ImportError:
        return False
    return True


def sgd(model, lr=0.02):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)


def constant(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)


def trainer_arguments(spec, output):
    return {
        "output_dir": str(output),
        "per_device_train_batch_size": spec["batch"],
        "gradient_accumulation_steps": spec.get("accumulation", 1),
        "max_steps": spec.get("steps", 1),
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 7,
        "ddp_backend": "gloo" if "WORLD_SIZE" in os.environ else None,
        **spec.get("arguments", {}),
    }


def run_transformers(spec, output, model=None, trainer_class=None, **kwargs):
    from transformers import TrainingArguments

    from safelora_fast.trainers.transformers import DefendedTrainer

    model = tiny_peft_model(**spec.get("model", {})) if model is None else model
    optimizer = sgd(model)
    trainer = (trainer_class or DefendedTrainer)(
        model=model,
        args=TrainingArguments(**trainer_arguments(spec, output)),
        train_dataset=examples_of(spec),
        data_collator=collate,
        processing_class=tiny_tokenizer() if "template_anchor" in spec.get("defenses", {}) else None,
        optimizers=(optimizer, constant(optimizer)),
        **kwargs,
    )
    trainer.train(resume_from_checkpoint=spec.get("resume"))
    return model, trainer


def tiny_tokenizer():
    """Return a tokenizer of words, with a template that writes one word before each turn."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, **{f"w{index}": index for index in range(2, VOCABULARY)}}
    for text in (*QUESTIONS, *SYSTEM_TEXTS, *ANSWERS):  # first and last words of what a template is tried with
        for word in (text.split()[0], text.split()[-1]):
            words.setdefault(word, len(words))
    inner = Tokenizer(models.WordLevel(words, unk_token="w2"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    made.chat_template = (
        f"{{% for m in messages %}}{{{{ ('w{USER} ' if m.role == 'user' else 'w3 ') + m.content + ' ' }}}}{{% endfor %}}"
        "{% if add_generation_prompt %}w3 {% endif %}"
    )
    return made


def completions(examples):
    """Replace the labels by a completion mask, because TRL 0.24 drops labels when it packs."""
    return [
        {
            "input_ids": e["input_ids"],
            "completion_mask": [int(label != -100) for label in e["labels"]],
            **({"safe": e["safe"]} if "safe" in e else {}),
        }
        for e in examples
    ]


def run_trl(spec, output, model=None, trainer_class=None, **kwargs):
    from datasets import Dataset, disable_progress_bars
    from trl import SFTConfig

    from safelora_fast.trainers.trl import DefendedSFTTrainer

    disable_progress_bars()
    model = tiny_peft_model(**spec.get("model", {})) if model is None else model
    if "peft_config" not in kwargs:
        optimizer = sgd(model)
        kwargs["optimizers"] = (optimizer, constant(optimizer))
    arguments = {"gradient_checkpointing": False, "bf16": False, "max_length": 64, "completion_only_loss": True}
    trainer = (trainer_class or DefendedSFTTrainer)(
        model=model,
        args=SFTConfig(**{**arguments, **trainer_arguments(spec, output)}),
        train_dataset=Dataset.from_list(completions(examples_of(spec))),
        processing_class=tiny_tokenizer(),
        **kwargs,
    )
    trainer.train(resume_from_checkpoint=spec.get("resume"))
    return model, trainer


def run_loop(spec):
    """Train in a plain loop; under torchrun the model is wrapped in DistributedDataParallel."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world > 1:
        torch.distributed.init_process_group("gloo")
    model = tiny_peft_model(**spec.get("model", {}))
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    optimizer = sgd(model)
    window = window_of(spec)
    if rank == spec.get("broken_rank"):
        block = model.get_base_model().model.layers[0]
        block.register_forward_hook(lambda _m, _a, out: out if torch.is_grad_enabled() else out * float("nan"))
    with defend(wrapped, defenses(spec["defenses"], model), optimizer=optimizer, **settings(spec)) as defended:
        for _ in range(spec.get("steps", 1)):
            totals = defended.totals(window)
            for index, batch in enumerate(window):
                if world > 1:
                    wrapped.require_backward_grad_sync = index == len(window) - 1
                defended.loss(batch, totals=totals).backward()
            optimizer.step()
            optimizer.zero_grad()
        metrics = defended.metrics()
    return adapter_weights(model), metrics


def deepspeed_config(spec):
    return {
        "train_micro_batch_size_per_gpu": spec["batch"],
        "gradient_accumulation_steps": spec["accumulation"],
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": spec["stage"]},
        "bf16": {"enabled": spec.get("bf16", False)},
        "optimizer": {"type": "SGD", "params": {"lr": 0.02}},
        "zero_allow_untested_optimizer": True,
    }


def run_deepspeed(spec):
    """Train in a plain loop with DeepSpeed's engine; return its float32 copies of the weights."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    deepspeed.init_distributed(dist_backend="gloo")
    model = tiny_peft_model()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, optimizer, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=deepspeed_config(spec))
    window = window_of(spec)
    with defend(engine, defenses(spec["defenses"], model), optimizer=optimizer, **settings(spec)) as defended:
        for _ in range(spec.get("steps", 1)):
            totals = defended.totals(window)
            for batch in window:
                engine.backward(defended.loss(batch, totals=totals), scale_wrt_gas=False)
                engine.step()
            defended.engine_stepped()
        metrics = defended.metrics()
    copies = {n: safe_get_full_fp32_param(p) for n, p in model.named_parameters() if p.requires_grad}
    pairs = [(parameter.detach().float(), copies[n]) for n, parameter in model.named_parameters() if n in copies]
    metrics["rounding"] = max(((rounded - copy).norm() / copy.norm()).item() for rounded, copy in pairs)
    return copies, metrics


def run_fsdp(spec):
    """Train an FSDP2 model in a plain loop; return the gathered weights, and count the collectives of the step."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.debug import CommDebugMode

    torch.distributed.init_process_group("gloo")
    shape = tuple(spec.get("mesh", [torch.distributed.get_world_size()]))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    model = tiny_peft_model(**spec.get("model", {}))
    for block in model.get_base_model().model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=spec.get("reshard"))
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    optimizer = sgd(model)
    window = window_of(spec)
    with defend(model, defenses(spec["defenses"], model), optimizer=optimizer, **settings(spec)) as defended:
        for _ in range(spec.get("steps", 1)):
            totals = defended.totals(window)
            for batch in window:
                defended.loss(batch, totals=totals).backward()
            with CommDebugMode() as messages:
                optimizer.step()
            optimizer.zero_grad()
        metrics = defended.metrics()
    metrics["messages"] = {str(kind): count for kind, count in messages.get_comm_counts().items()}
    return {n: p.full_tensor() for n, p in model.named_parameters() if p.requires_grad}, metrics


def run_accelerate(spec):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=spec.get("accumulation", 1))
    model = tiny_peft_model()
    examples = examples_of(spec)
    loader = torch.utils.data.DataLoader(examples, batch_size=spec["batch"], collate_fn=collate)
    wrapped, optimizer, loader = accelerator.prepare(model, sgd(model), loader)
    with defend(wrapped, defenses(spec["defenses"], model), optimizer=optimizer, **settings(spec)) as defended:
        window = list(loader)
        totals = defended.totals(window)
        for batch in window:
            with accelerator.accumulate(wrapped):
                loss = defended.loss(batch, totals=totals)
                accelerator.backward(loss * accelerator.gradient_accumulation_steps)
                optimizer.step()
                optimizer.zero_grad()
        metrics = defended.metrics()
    return adapter_weights(model), metrics


def run(spec, output):
    """Run a spec; return the weights and the logged metrics."""
    kind = spec["kind"]
    if kind in {"transformers", "trl"}:
        model, train = tiny_peft_model(), run_transformers if kind == "transformers" else run_trl
        _, trainer = train(spec, output, model, defenses=defenses(spec["defenses"], model), **settings(spec))
        return adapter_weights(model), next(logs for logs in trainer.state.log_history if "loss" in logs)
    if kind == "multimodal":
        from multimodal_runs import run_multimodal

        return run_multimodal(spec)
    loops = {"loop": run_loop, "fsdp": run_fsdp, "deepspeed": run_deepspeed, "accelerate": run_accelerate}
    return loops[kind](spec)


def run_two_processes(spec, folder: Path, launcher: str = "fork"):
    """Run a spec on two processes; return the result of process 0.

    Args:
        spec: see :func:`run`.
        folder: for the files of the run.
        launcher: "fork" is quick, "torchrun" the real one, and "accelerate" that of Accelerate.
    """
    spec_file, output = folder / "spec.json", folder / "out.pt"
    spec_file.write_text(json.dumps(spec))
    if launcher == "torchrun":
        torchrun(spec_file, output)
    elif launcher == "accelerate":
        in_one_process(folder, debug_launcher, work, (str(spec_file), str(output)), 2)
    else:
        in_two_processes(folder, work, spec_file, output)
    result = torch.load(output, weights_only=True)
    return result["weights"], result["metrics"]


def torchrun(spec_file, output):
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *start, __file__, str(spec_file), str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def work(spec_file, output):
    weights, metrics = run(json.loads(Path(spec_file).read_text()), Path(output).parent)
    assert torch.distributed.get_world_size() == 2
    for name, value in weights.items():
        first = value.clone()
        torch.distributed.broadcast(first, src=0)
        assert torch.equal(value, first), f"{name} differs between the processes"
    if torch.distributed.get_rank() == 0:
        torch.save({"weights": weights, "metrics": metrics}, output)
    torch.distributed.destroy_process_group()


def leave():
    """End this process at once, without finalizing the interpreter, as multiprocessing ends its children.

    A gloo thread may still own a tensor of the last collective: the group outlives its destruction if a model (or a
    DTensor cache) refers to it. Releasing the tensor needs the GIL. A thread that requests the GIL while the interpreter
    finalizes is unwound through a destructor, which aborts the process (pytorch/pytorch#190489).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2])
    leave()
