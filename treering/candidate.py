"""One candidate version in the making: what the parent knew, what is learned now, what is measured."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from treering import early, experts, general, launch, mix, rates
from treering.batches import Batch, make_batch
from treering.config import names
from treering.errors import ConfigError, TreeringError
from treering.evaluate import conditions, evaluate
from treering.features import features
from treering.files import fsync_tree, write_file
from treering.handover import Handover
from treering.keep import FROM_FEATURES, FROM_LOSSES, ORDERED
from treering.memory import Memory, Teacher, some
from treering.methods import Losses, Methods
from treering.methods.lwf import TOP_K
from treering.metrics import metric_for
from treering.model import Tokens, encode, load, load_tokenizer, save_weights, use_bf16
from treering.passes import losses
from treering.progress import bar
from treering.readings import Readings
from treering.recovery import Recovery
from treering.registry import Version
from treering.results import Result, read_results, write_results
from treering.room import peak_gpu_memory_mb, peak_memory_mb
from treering.schedule import passes, peak_rate, plan_steps
from treering.train import teach, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from treering.config import Config
    from treering.data.example import Example
    from treering.plan import Plan
    from treering.schedule import Step
    from treering.stop import Stop
    from treering.worker import Trained
    from treering.workspace import Workspace

RESULTS = "results.parquet"
PARENT_RESULTS = "parent.parquet"

MEASURED = 64
"""Rows that methods are told the losses of, new ones and remembered ones."""


class Candidate:
    """The model, the memory and the rows of one update. Its methods are the update's steps, in their order.

    `staging` holds what an interrupted update needs to go on: the parent's results and the training checkpoints.
    """

    def __init__(
        self,
        ws: Workspace,
        plan: Plan,
        parent: Version | None,
        base: Path,
        config: Config,
        staging: Path,
        *,
        stop: Stop | None = None,
        quiet: bool = False,
    ) -> None:
        self.started = time.perf_counter()
        self.plan, self.parent, self.config, self.staging = plan, parent, config, staging
        self.base, self.root = base, ws.root
        self.stop, self.quiet = stop, quiet
        torch.set_num_threads(plan.machine["threads"])
        self.readings = Readings(staging)
        self.tokenizer = load_tokenizer(base, config.trust_remote_code)
        _check_kind(parent, config)
        self.model = load(base, config, parent)
        self.methods = Methods(config)
        self.memory = _memory(parent, config)
        measured: dict[str, list[str]] = parent.manifest["held_out"] if parent else {}
        self.held_out = {
            task: [*measured.get(task, ()), *plan.fresh.get(task, ())] for task in {**measured, **plan.fresh}
        }
        held_out_ids = [id for ids in self.held_out.values() for id in ids]
        wanted = list(dict.fromkeys([*plan.row_ids, *self.memory.rows, *held_out_ids]))
        self.examples: dict[str, Example] = ws.catalog.examples(wanted)
        self.metrics: dict[str, str] = dict(parent.manifest["metrics"]) if parent else {}
        for task, ids in plan.rows.items():
            self.metrics.setdefault(task, metric_for([self.examples[id].label for id in ids]))
        self.general = general.read(config, ws.root, self.tokenizer, plan.general)
        self.rows: dict[str, Tokens] = {}
        self.aside: list[str] = []
        self.mix: mix.Mix | None = None
        self.steps: list[Step] = []
        self.log: list[dict[str, float]] = []
        self.rate = rates.Choice(peak_rate(config, self.model), "not chosen yet")
        self.expert: experts.Choice | None = None
        self.vectors, self.classes = torch.empty(0), list[str]()
        self.replayed = self.memory
        self.train_seconds = self.ending_seconds = 0.0  # Of all training; of what methods do at its end.
        self.trainable_parameters = 0
        """How many numbers this update can change."""
        self.processes: list[Trained] = []

    def measure_parent(self) -> list[Result]:
        """The parent's results on every held-out row: those it was made with, and the fresh ones scored now."""
        kept = self.staging / PARENT_RESULTS
        if not kept.exists():
            write_results(kept, self._score(self.unmeasured(), "measuring the parent"))
        return self._known() + read_results(kept)

    def unmeasured(self) -> list[tuple[str, str]]:
        """The held-out rows, each with its task, that the parent was not scored on when it was made."""
        done = {result.id for result in self._known()}
        return [(id, task) for task, ids in self.held_out.items() for id in ids if id not in done]

    def prepare(self) -> None:
        """Make the model ready to learn, and decide what it is taught at each step."""
        if self.config.adapter_composition == "experts":
            self._choose_expert()
        self.model = _prepared(self.model, self.methods, self.config, self.parent)
        self.trainable_parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.rows = {id: self._tokens(id) for id in [*self.plan.row_ids, *self.memory.rows]} | self.general
        lengths = {id: len(row.ids) for id, row in self.rows.items()}
        self.aside = early.aside(self.plan.row_ids, self.config)
        self.mix = self._mixed()
        self.replayed.weights = self.mix.weights if self.mix else {}
        self.steps = plan_steps(self.new, self.replayed, self.methods, lengths, self.config, list(self.general))

    def choose_rate(self) -> None:
        """Settle the learning rate: as set, as an earlier run of this update chose it, or by a range test now."""
        sample = rates.Sample.drawn(self.new, self.replayed, self.config)
        found = rates.given(self.config, self.rate.value, sample, self.steps) or rates.saved(self.staging)
        if found is None:
            with bar("trying learning rates", rates.RATES, self.quiet) as advance:
                found = self.range_test(sample).choose(advance)
            rates.save(self.staging, found)
        self.rate = found
        self.train_seconds += found.seconds
        self.config = self.config.model_copy(update={"learning_rate": found.value})

    def range_test(self, sample: rates.Sample) -> rates.RangeTest:
        """A range test on `sample`, before the first step."""
        return rates.RangeTest(
            self.model,
            self.rows,
            sample,
            self.methods,
            self.config,
            pad_id=self.pad_id,
            teachers=self._teachers(sample.new, sample.memory.rows, "asking the teacher before the range test"),
            parents=self._parents(sample.new, "asking the parent before the range test"),
            stop=self.stop,
            folder=self.staging / "range-test",
        )

    def learn(self, track: Callable[[Mapping[str, float]], None] | None = None) -> list[dict[str, float]]:
        """Train over `steps`: the new rows and what the methods mix in; returns the log, an entry a step taken.

        `track` is given each entry when it is finished, and what was measured on the rows kept aside.
        """
        started = time.perf_counter()
        drawn = {id for step in self.steps for batch in step for id in batch}
        replayed = [id for id in self.replayed.rows if id in drawn]
        teachers = self._teachers(self.new, replayed, "asking the teacher before training")
        parents = self._parents(self.new, "asking the parent before training")
        if self.config.launcher != "local":
            self._learn_in_processes(teachers, parents, track)
            track = None  # It was told.
        # Where processes did it, the last checkpoint has all steps done.
        self.log = train(
            self.model,
            self.rows,
            self.steps,
            self.methods,
            self.config,
            pad_id=self.pad_id,
            teachers=teachers,
            parents=parents,
            aside=[self.rows[id] for id in self.aside],
            checkpoints=self._checkpoints,
            stop=self.stop,
            track=track,
            quiet=self.quiet or self.config.launcher != "local",
        )
        trained = time.perf_counter()
        self.methods.after_training(self.model, self._losses)
        self.ending_seconds = time.perf_counter() - trained
        if use_bf16(self.config)[0]:
            # As it will be saved, so that what is measured is what serves; buffers (rotary frequencies) and LoRA's
            # matrices stay float32.
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad and "lora_" not in name:
                    parameter.data = parameter.data.bfloat16()
        if self.expert is not None:
            experts.keep(self.model, self.expert, self.vectors, self.classes)
        self.train_seconds += time.perf_counter() - started
        return self.log

    def _learn_in_processes(
        self,
        teachers: Mapping[str, Teacher] | None,
        parents: Mapping[str, Teacher] | None,
        track: Callable[[Mapping[str, float]], None] | None,
    ) -> None:
        handover = Handover(
            self.config,
            self.base,
            self.parent,
            self.rows,
            self.steps,
            self.pad_id,
            launch.threads(self.config, self.plan.machine["threads"]),
            self._checkpoints,
            teachers,
            parents,
        )
        del self.model  # The room is theirs.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        folder = self.staging / "processes"
        self.processes = launch.train(handover, folder, self.root, stop=self.stop, track=track, quiet=self.quiet)
        if not (self._checkpoints / f"step-{len(self.steps)}").exists():
            raise TreeringError(
                f"{self._checkpoints} has no checkpoint of the last step, which the processes have made: all machines "
                "that train need the workspace and the base model under the same path, on a disk that they share"
            )
        shutil.rmtree(folder)
        self.model, self.methods = begun(self.base, self.config, self.parent)

    def measure(self) -> list[Result]:
        """The candidate's results on every held-out row."""
        rows = [(id, task) for task, ids in self.held_out.items() for id in ids]
        return self._score(rows, "measuring the candidate")

    def remember(self) -> None:
        """Show the memory the new rows, and what it wants to know of all; store the logits of those it keeps."""
        ordered = self.memory.policy in ORDERED
        show = self.memory.show if ordered else self.memory.add
        for task, ids in self.plan.rows.items():
            show([self.examples[id] for id in ids], task, labelled=self.metrics[task] == "exact_match")
        if ordered:
            self._order()
        if "distill" in self.config.protect and self.config.distill.teacher == "stored":
            # Of other experts' rows the one that was taught knows nothing.
            own = {*self.plan.row_ids, *self.replayed.rows}
            wanted = [id for id in self.memory.rows if id in own and id not in self.memory.teachers]
            rows = [self._tokens(id) for id in wanted]
            self.memory.teachers |= self._logits(rows, self.config.distill.top_k, "taking logits to remember")

    def _order(self) -> None:
        """Have the memory decide which of its rows stay, new ones included."""
        rows = [self._tokens(id) for id in self.memory.rows]
        found: list[float] | None = None
        about: torch.Tensor | None = None
        if self.memory.policy in FROM_LOSSES:
            with bar("reading rows", len(rows), self.quiet) as advance:
                reading = self.readings.of("reading rows to remember")
                measured = losses(self.model, rows, self.config, self.pad_id, self.stop, reading, advance)
            found = [loss if math.isfinite(loss) else early.BOUNDLESS for loss in measured]
        if self.memory.policy in FROM_FEATURES:
            about = self._about([row.id for row in rows])
        ids = [row.id for row in rows]
        self.memory.order(
            None if found is None else dict(zip(ids, found, strict=True)),
            None if about is None else dict(zip(ids, about, strict=True)),
        )

    def write(self, base_name: str, results: Sequence[Result], log: Sequence[dict[str, float]]) -> None:
        """Fill `folder` with what the version consists of, all but its report and manifest."""
        folder = self.folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        save_weights(self.model, self.tokenizer, folder, base_name)
        if self.expert is not None:
            found = experts.of(self.model)
            assert found is not None
            experts.save(folder, found, self.expert.expert, self.parent)
        self.memory.save(folder)
        write_results(folder / RESULTS, results)
        write_file(folder / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in log).encode())
        shutil.copyfile(self.staging / PARENT_RESULTS, folder / PARENT_RESULTS)
        state = self.methods.after_update(self.model, self._learned)
        if state:
            from safetensors.torch import save_file

            save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "state.safetensors")
        fsync_tree(folder)  # Here, not in the commit, so that a rollback need not wait for it.

    @property
    def new(self) -> list[str]:
        """The new rows that are learned: all but those kept aside."""
        aside = set(self.aside)
        return [id for id in self.plan.row_ids if id not in aside]

    @property
    def taken(self) -> list[Step]:
        """The steps that were taken: all, but where training stopped early."""
        return self.steps[: len(self.log)]

    @property
    def folder(self) -> Path:
        """Where the version takes shape."""
        return self.staging / "version"

    @property
    def _checkpoints(self) -> Path:
        return self.staging / "checkpoints"

    @property
    def choices(self) -> dict[str, dict[str, Any]]:
        """What was chosen automatically, and why."""
        found = {
            "learning_rate": {"value": self.rate.value, "reason": self.rate.reason},
            "num_train_epochs": {"value": passes(self.config, len(self.new)), "reason": self._length},
            "bf16": dict(zip(("value", "reason"), use_bf16(self.config), strict=True)),
            "memory": {"value": len(self.memory), "reason": f"size {self.memory.size}, {self.memory.policy}"},
        }
        if self.expert is not None:
            found["expert"] = {"value": self.expert.expert, "reason": self.expert.reason}
        if self.mix:
            found["memory.mix"] = {"value": self.config.memory.mix, "reason": self.mix.reason}
        for task in self.plan.rows:
            few = "short answers, each used at least twice on average"
            reason = few if self.metrics[task] == "exact_match" else "answers are no small label set"
            found[f"metric of {task}"] = {"value": self.metrics[task], "reason": reason}
        if self.config.early_stopping_steps is not None:
            found["early_stopping_steps"] = early.choice(
                self.log, len(self.plan.row_ids), len(self.aside), len(self.steps), self.config
            )
        found |= self.readings.choices | Readings(self._checkpoints).choices | self.methods.choices
        return found | Recovery(self._checkpoints).choices(self.rate.value)

    @property
    def _length(self) -> str:
        """Why the training is as long as it is."""
        if self.config.max_steps > 0:
            return f"not used: max_steps is {self.config.max_steps}"
        if self.config.num_train_epochs != "auto":
            return "as set"
        return f"{len(self.new)} new rows, {len(self.steps)} steps with the replayed ones"

    @property
    def peaks(self) -> tuple[float, float | None]:
        """The most memory that was held, in MB, by all processes together, and GPU memory by the one that had most."""
        own, gpu = peak_memory_mb(), peak_gpu_memory_mb()
        gpus = [gpu, *(process.peak_gpu_memory_mb for process in self.processes)]
        most = max((peak for peak in gpus if peak is not None), default=None)
        return own + sum(process.peak_memory_mb for process in self.processes), most

    @property
    def pad_id(self) -> int:
        """The token that fills rows up to the length of their batch."""
        return cast(int, self.tokenizer.pad_token_id)

    def _mixed(self) -> mix.Mix | None:
        """Which remembered rows are replayed more often, as an earlier run of this update found or as is found now."""
        if self.config.memory.mix == "uniform" or not self.replayed.rows:
            return None
        found = mix.saved(self.staging)
        if found is None:
            given = self.new, self.replayed
            if self.config.memory.mix == "interference":
                found = mix.interference(
                    self.model, self.rows, *given, self.methods, self.config, self.pad_id, self.stop
                )
            else:
                found = mix.similarity(self._about, *given, self.config)
            mix.save(self.staging, found)
        return found

    def _tokens(self, id: str) -> Tokens:
        return encode(self.tokenizer, self.examples[id])

    def _known(self) -> list[Result]:
        """The results that the parent was made with, as far as they can be compared with today's."""
        if self.parent is None or self.parent.manifest["evaluation"] != conditions(self.config):
            return []
        return read_results(self.parent.folder / RESULTS)

    def _parents(self, new: Sequence[str], title: str) -> dict[str, Teacher] | None:
        """What the parent makes of those new rows, for `lwf`; to be asked before the first step changes the model."""
        if self.parent is None or "lwf" not in self.config.protect:
            return None
        return self._logits([self.rows[id] for id in new], TOP_K, title)

    def asked_of_parent(self, new: Iterable[str], remembered: Iterable[str]) -> list[str]:
        """Those of the rows that the parent is the teacher of, for `distill`."""
        asked = self.config.distill
        if self.parent is None or "distill" not in self.config.protect or asked.teacher == "stored":
            return []
        return [*(new if asked.rows != "replayed" else ()), *(remembered if asked.rows != "new" else ())]

    def _teachers(self, new: Sequence[str], remembered: Iterable[str], title: str) -> Mapping[str, Teacher] | None:
        """What `distill` holds rows to; where that is the parent, to be asked before the first step as well."""
        if "distill" not in self.config.protect:
            return None
        if self.config.distill.teacher == "stored":
            return self.memory.teachers
        rows = [self.rows[id] for id in self.asked_of_parent(new, remembered)]
        return self._logits(rows, TOP_K, title, self.config.distill.temperature) if rows else None

    def _choose_expert(self) -> None:
        """Have the adapter that is taught be that of the expert which the new rows are for."""
        self.vectors = self._about(self.plan.row_ids)
        known = experts.of(self.model)
        self.classes = [
            experts.class_of(task, self.examples[id].label if self.metrics[task] == "exact_match" else "")
            for task, ids in self.plan.rows.items()
            for id in ids
        ]
        self.expert = experts.choose(known, self.vectors, self.classes)
        experts.begin(self.model, self.expert)
        self.replayed = experts.part(self.memory, self.expert, known, self.classes)

    def _about(self, ids: Sequence[str]) -> torch.Tensor:
        """The features of these rows' prompts, `[rows, size]`."""
        prompts = [self.examples[id].prompt for id in ids]
        settings: dict[str, Any] = {"stop": self.stop, "reading": self.readings.of("reading prompts")}
        with bar("reading prompts", len(prompts), self.quiet) as advance:
            return features(self.model, self.tokenizer, prompts, self.config, advance=advance, **settings)

    def _learned(self) -> list[Batch]:
        """The new rows, each a batch of its own."""
        return [make_batch([self._tokens(id)], self.pad_id, self.model.device) for id in self.plan.row_ids]

    def _losses(self) -> Losses:
        """The losses of the model as it is, on some rows that were new and some that are remembered."""
        means = [0.0, 0.0]
        for at, ids in enumerate((self.new, self.replayed.rows)):
            rows = [self.rows[id] for id in some(ids, MEASURED, f"{self.config.seed}:losses")]
            if rows:
                means[at] = math.fsum(losses(self.model, rows, self.config, self.pad_id, self.stop)) / len(rows)
        return Losses(*means)

    def _logits(
        self, rows: Sequence[Tokens], top_k: int, title: str, temperature: float | None = None
    ) -> dict[str, Teacher]:
        return teach(
            self.model,
            rows,
            self.config,
            top_k=top_k,
            pad_id=self.pad_id,
            temperature=temperature,
            stop=self.stop,
            quiet=self.quiet,
            reading=self.readings.of(title),
        )

    def _score(self, rows: Sequence[tuple[str, str]], title: str) -> list[Result]:
        pairs = [(self.examples[id], task) for id, task in rows]
        return evaluate(
            self.model,
            self.tokenizer,
            pairs,
            self.metrics,
            self.config,
            title=title,
            stop=self.stop,
            quiet=self.quiet,
            reading=self.readings.of(title),
        )


def begun(base: Path, config: Config, parent: Version | None) -> tuple[PreTrainedModel, Methods]:
    """The model as an update begins to teach it, and the methods that made it ready."""
    methods = Methods(config)
    return _prepared(load(base, config, parent), methods, config, parent), methods


def _prepared(model: PreTrainedModel, methods: Methods, config: Config, parent: Version | None) -> PreTrainedModel:
    torch.manual_seed(config.seed)  # New adapters begin at random.
    return methods.prepare(model, _state(parent))


def _check_kind(parent: Version | None, config: Config) -> None:
    """Raise `ConfigError` where an adapter would have to grow on a whole model or on other layers, or the reverse."""
    if parent is None:
        return
    adapter = parent.kind == "lora"
    if parent.kind != (config.finetuning_type if config.finetuning_type in ("lora", "adapter") else "full"):
        kind = parent.manifest["config"]["finetuning_type"] if parent.kind == "full" else parent.kind
        what = {"lora": "an adapter", "adapter": "a bottleneck adapter", "full": "a whole model"}[parent.kind]
        raise ConfigError(
            f"finetuning_type is {config.finetuning_type}, but {parent.name} is {what}: "
            f"set finetuning_type: {kind}, or start a new workspace"
        )
    if bool(parent.experts) != (config.adapter_composition == "experts"):
        has, way_out = ("experts", "experts") if parent.experts else ("one adapter", "continue")
        raise ConfigError(
            f"adapter_composition is {config.adapter_composition}, but {parent.name} has {has}: "
            f"set adapter_composition: {way_out}, or start a new workspace"
        )
    for key in ("lora_target", "additional_target") if adapter else ():
        wanted, found = getattr(config, key), parent.manifest["config"].get(key)
        if set(names(wanted or "")) != set(names(found or "")):
            way_out = f"set {key}: {found}" if found else "leave it out"
            raise ConfigError(
                f"{key} is {wanted}, but {parent.name} was made with {found}: {way_out}, or start a new workspace"
            )


def _memory(parent: Version | None, config: Config) -> Memory:
    """The parent's memory under today's settings, or an empty one."""
    memory = Memory(config.memory.size, config.memory.policy, config.seed)
    if parent is not None and (parent.folder / "memory.json").exists():
        memory = Memory.load(parent.folder)
        memory.size, memory.policy = config.memory.size, config.memory.policy
    return memory


def _state(parent: Version | None) -> dict[str, torch.Tensor]:
    path = parent.folder / "state.safetensors" if parent else None
    if path is None or not path.exists():
        return {}
    from safetensors.torch import load_file

    return load_file(path)
