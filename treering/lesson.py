"""One lesson of an update: what one adapter, or the whole model, is taught, and how that goes.

An update is a list of lessons. Without experts it is one, of all its rows.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from treering import early, experts, launch, mix, rates, scaling
from treering.errors import TreeringError
from treering.handover import Handover
from treering.memory import Memory, Remembered, Teacher, some
from treering.methods import Losses, Methods
from treering.methods.lwf import TOP_K
from treering.model import Tokens, load, precision
from treering.passes import losses
from treering.preference import with_rejected
from treering.progress import bar
from treering.readings import Readings
from treering.recovery import Recovery
from treering.registry import Version
from treering.schedule import passes, peak_rate, plan_steps
from treering.train import teach, train
from treering.written import Written

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from treering.config import Config
    from treering.schedule import Step
    from treering.stop import Stop
    from treering.worker import Trained

MEASURED = 64
"""Rows that methods are told the losses of, new ones and remembered ones."""


@dataclass
class Pupil:
    """The model that is taught, and what all lessons of an update have in common.

    `rows` has the tokens of every row by id, those of `general` text too; `root` is the workspace, `base` and `parent`
    where the model comes from.
    """

    model: PreTrainedModel
    base: Path
    parent: Version | None
    root: Path
    threads: int
    pad_id: int
    rows: dict[str, Tokens]
    general: Sequence[str]
    stop: Stop | None
    quiet: bool


class Lesson:
    """The new rows `ids` and the `memory` that is replayed with them. Its methods are the steps, in their order.

    The memory is the lesson's own: what the parent writes is added to it.

    `folder` holds what an interrupted lesson needs to go on. With an `expert` its weights begin as `start`, by name,
    and end as `weights`; `begin` may come again until they are learned, where other lessons came between.
    """

    def __init__(
        self,
        pupil: Pupil,
        config: Config,
        ids: Sequence[str],
        memory: Memory,
        folder: Path,
        readings: Readings,
        expert: experts.Choice | None = None,
        start: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.pupil, self.config, self.memory = pupil, config, memory
        self.ids, self.aside = list(ids), early.aside(ids, config)
        self.folder, self.readings = folder, readings
        self.expert, self.start = expert, start
        self.methods = Methods(config)
        self.mix: mix.Mix | None = None
        self.steps: list[Step] = []
        self.log: list[dict[str, float]] = []
        self.rate = rates.Choice(peak_rate(config, pupil.model), "not chosen yet")
        self.weights: dict[str, Tensor] = {}
        self.written = Written()
        self.seconds = self.ending_seconds = 0.0  # Of all training; of what methods do at its end.
        self.trainable_parameters = 0
        """How many numbers this lesson can change."""
        self.processes: list[Trained] = []

    def begin(self) -> None:
        """Make the model ready to learn, from where the expert begins if there is one."""
        if self.start is not None:
            experts.put(self.pupil.model, self.start)
        self.methods = Methods(self.config)
        self.pupil.model = prepared(self.pupil.model, self.methods, self.config, self.pupil.parent)
        self.trainable_parameters = sum(p.numel() for p in self.pupil.model.parameters() if p.requires_grad)

    def take(self, written: Written, rows: Mapping[str, Tokens]) -> None:
        """Replay what the parent has written, too, and its answers instead of the stored ones; `rows` are its tokens.

        What was stored of another answer is no teacher of this one.
        """
        self.written = written
        self.pupil.rows |= rows
        self.memory.rows |= {id: Remembered(id, "", "") for id in written.rows}
        self.memory.teachers = {id: known for id, known in self.memory.teachers.items() if id not in written.answers}

    def plan(self, about: Callable[[Sequence[str]], Tensor]) -> None:
        """Decide what is taught at each step; `about` gives the features of rows by their ids, `[rows, size]`."""
        lengths = {id: len(row.ids) for id, row in self.pupil.rows.items()}
        self.mix = self._mixed(about)
        self.memory.weights = self.mix.weights if self.mix else {}
        self.steps = plan_steps(self.new, self.memory, self.methods, lengths, self.config, self.pupil.general)

    def choose_rate(self) -> None:
        """Settle the learning rate: as set, as an earlier run of this update chose it, or by a range test now."""
        sample = rates.Sample.drawn(self.new, self.memory, self.config)
        found = rates.given(self.config, self.rate.value, sample, self.steps) or rates.saved(self.folder)
        if found is None:
            with bar(f"trying learning rates{self.of}", rates.RATES, self.pupil.quiet) as advance:
                found = self.range_test(sample).choose(advance)
            rates.save(self.folder, found)
        self.rate = found
        self.seconds += found.seconds
        self.config = self.config.model_copy(update={"learning_rate": found.value})

    def range_test(self, sample: rates.Sample) -> rates.RangeTest:
        """A range test on `sample`, before the first step."""
        return rates.RangeTest(
            self.pupil.model,
            self.pupil.rows,
            sample,
            self.methods,
            self.config,
            pad_id=self.pupil.pad_id,
            teachers=self._teachers(sample.new, sample.memory.rows, "asking the teacher before the range test"),
            parents=self._parents(sample.new, "asking the parent before the range test"),
            stop=self.pupil.stop,
            folder=self.folder / "range-test",
        )

    def learn(self, track: Callable[[Mapping[str, float]], None] | None = None) -> None:
        """Train over `steps`: the new rows and what the methods mix in; `log` has an entry a step taken.

        `track` is given each entry when it is finished, and what was measured on the rows kept aside.
        """
        started = time.perf_counter()
        drawn = {id for step in self.steps for batch in step for id in batch}
        replayed = [id for id in self.memory.rows if id in drawn]
        teachers = self._teachers(self.new, replayed, "asking the teacher before training")
        parents = self._parents(self.new, "asking the parent before training")
        self._ask_reference()
        if self.config.launcher != "local":
            started += self._learn_in_processes(teachers, parents, track)
            track = None  # It was told.
        # Where processes did it, the last checkpoint has all steps done.
        self.log = train(
            self.pupil.model,
            self.pupil.rows,
            self.steps,
            self.methods,
            self.config,
            pad_id=self.pupil.pad_id,
            teachers=teachers,
            parents=parents,
            aside=[self.pupil.rows[id] for id in self.aside],
            checkpoints=self.checkpoints,
            stop=self.pupil.stop,
            track=track,
            quiet=self.pupil.quiet or self.config.launcher != "local",
        )
        if self.pupil.stop is not None:
            self.pupil.stop.check()
        trained = time.perf_counter()
        self.methods.after_training(self.pupil.model, self._losses)
        self.ending_seconds = time.perf_counter() - trained
        dtype, _ = precision(self.config)
        if dtype != torch.float32:
            # As it will be saved, so that what is measured is what serves; buffers (rotary frequencies) and LoRA's
            # matrices stay float32.
            for name, parameter in self.pupil.model.named_parameters():
                if parameter.requires_grad and "lora_" not in name:
                    parameter.data = rounded(name, parameter.data, dtype)
        if self.expert is not None:
            self.weights = experts.weights(self.pupil.model)
        self.seconds += time.perf_counter() - started

    @property
    def new(self) -> list[str]:
        """The new rows that are learned: all but those kept aside."""
        aside = set(self.aside)
        return [id for id in self.ids if id not in aside]

    @property
    def knows(self) -> bool:
        """Whether the weights it begins with have learned what is its own to keep: not those of a new expert."""
        return self.pupil.parent is not None and (self.expert is None or self.expert.begins == self.expert.expert)

    @property
    def taken(self) -> list[Step]:
        """The steps that were taken: all, but where training stopped early."""
        return self.steps[: len(self.log)]

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints are."""
        return self.folder / "checkpoints"

    @property
    def of(self) -> str:
        """What tells it from other lessons, behind the names of things."""
        return f" of {self.expert.expert}" if self.expert is not None else ""

    @property
    def choices(self) -> dict[str, dict[str, Any]]:
        """What was chosen automatically, and why."""
        found = {
            "learning_rate": {"value": self.rate.value, "reason": self.rate.reason},
            "num_train_epochs": {"value": passes(self.config, len(self.new)), "reason": self._length},
        }
        if self.mix:
            found["memory.mix"] = {"value": self.config.memory.mix, "reason": self.mix.reason}
        if self.config.early_stopping_steps is not None:
            found["early_stopping_steps"] = early.choice(
                self.log, len(self.ids), len(self.aside), len(self.steps), self.config
            )
        found |= self.written.choices
        found |= self.readings.choices | Readings(self.checkpoints).choices | self.methods.choices
        return found | Recovery(self.checkpoints).choices(self.rate.value) | scaling.choices(self.log)

    @property
    def _length(self) -> str:
        """Why the training is as long as it is."""
        if self.config.max_steps > 0:
            return f"not used: max_steps is {self.config.max_steps}"
        if self.config.num_train_epochs != "auto":
            return "as set"
        return f"{len(self.new)} new rows, {len(self.steps)} steps with the replayed ones"

    def _mixed(self, about: Callable[[Sequence[str]], Tensor]) -> mix.Mix | None:
        """Which remembered rows are replayed more often, as an earlier run of this update found or as is found now."""
        if self.config.memory.mix == "uniform" or not self.memory.rows:
            return None
        found = mix.saved(self.folder)
        if found is None:
            given = self.new, self.memory
            if self.config.memory.mix == "interference":
                pupil = self.pupil
                found = mix.interference(
                    pupil.model, pupil.rows, *given, self.methods, self.config, pupil.pad_id, pupil.stop
                )
            else:
                found = mix.similarity(about, *given, self.config)
            mix.save(self.folder, found)
        return found

    def asked_of_parent(self, new: Iterable[str], remembered: Iterable[str]) -> list[str]:
        """Those of the rows that the parent is the teacher of, for `distill`."""
        asked = self.config.distill
        if self.pupil.parent is None or "distill" not in self.config.protect or asked.teacher == "stored":
            return []
        return [*(new if asked.rows != "replayed" else ()), *(remembered if asked.rows != "new" else ())]

    def _teachers(self, new: Sequence[str], remembered: Iterable[str], title: str) -> Mapping[str, Teacher] | None:
        """What `distill` holds rows to; where that is the parent, to be asked before the first step as well."""
        if "distill" not in self.config.protect:
            return None
        if self.config.distill.teacher == "stored":
            return self.memory.teachers
        asked = self.asked_of_parent(new, remembered)
        return self._answered(asked, title, self.config.distill.temperature) if asked else None

    def _parents(self, new: Sequence[str], title: str) -> dict[str, Teacher] | None:
        """What the parent makes of those new rows, for `lwf`; to be asked before the first step changes the model."""
        if self.pupil.parent is None or "lwf" not in self.config.protect:
            return None
        return self._answered(new, title)

    def _ask_reference(self) -> None:
        """Note of each new pair by how much the model finds its chosen answer likelier, before the first step."""
        pairs = [self.pupil.rows[id] for id in self.new if self.pupil.rows[id].rejected is not None]
        if not pairs:
            return
        read, title = with_rejected(pairs), "asking the reference before training"
        with bar(title, len(read), self.pupil.quiet) as advance:
            found = losses(
                self.pupil.model,
                read,
                self.config,
                self.pupil.pad_id,
                self.pupil.stop,
                self.readings.of(title),
                advance,
            )
        sums = [-mean * len(row.answers) for mean, row in zip(found, read, strict=True)]
        for place, row in enumerate(pairs):
            self.pupil.rows[row.id] = replace(row, margin=sums[place] - sums[len(pairs) + place])

    def _answered(self, ids: Sequence[str], title: str, temperature: float | None = None) -> dict[str, Teacher]:
        pupil = self.pupil
        return teach(
            pupil.model,
            [pupil.rows[id] for id in ids],
            self.config,
            top_k=TOP_K,
            pad_id=pupil.pad_id,
            temperature=temperature,
            stop=pupil.stop,
            quiet=pupil.quiet,
            reading=self.readings.of(title),
        )

    def _losses(self) -> Losses:
        """The losses of the model as it is, on some rows that were new and some that are remembered."""
        means, pupil = [0.0, 0.0], self.pupil
        for at, ids in enumerate((self.new, self.memory.rows)):
            rows = [pupil.rows[id] for id in some(ids, MEASURED, f"{self.config.seed}:losses")]
            if rows:
                means[at] = math.fsum(losses(pupil.model, rows, self.config, pupil.pad_id, pupil.stop)) / len(rows)
        return Losses(*means)

    def _learn_in_processes(
        self,
        teachers: Mapping[str, Teacher] | None,
        parents: Mapping[str, Teacher] | None,
        track: Callable[[Mapping[str, float]], None] | None,
    ) -> float:
        """Returns the seconds that their start and what is around their training took."""
        pupil, started = self.pupil, time.perf_counter()
        handover = Handover(
            self.config,
            pupil.base,
            pupil.parent,
            pupil.rows,
            self.steps,
            pupil.pad_id,
            launch.threads(self.config, pupil.threads),
            self.checkpoints,
            teachers,
            parents,
        )
        del pupil.model  # The room is theirs.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        folder = self.folder / "processes"
        self.processes = launch.train(handover, folder, pupil.root, stop=pupil.stop, track=track, quiet=pupil.quiet)
        if not (self.checkpoints / f"step-{len(self.steps)}").exists():
            raise TreeringError(
                f"{self.checkpoints} has no checkpoint of the last step, which the processes have made: all machines "
                "that train need the workspace and the base model under the same path, on a disk that they share"
            )
        shutil.rmtree(folder)
        pupil.model, self.methods = begun(pupil.base, self.config, pupil.parent)
        return time.perf_counter() - started - max(trained.seconds for trained in self.processes)


def begun(base: Path, config: Config, parent: Version | None) -> tuple[PreTrainedModel, Methods]:
    """The model as an update begins to teach it, and the methods that made it ready."""
    methods = Methods(config)
    return prepared(load(base, config, parent), methods, config, parent), methods


def prepared(model: PreTrainedModel, methods: Methods, config: Config, parent: Version | None) -> PreTrainedModel:
    """`model` as `methods` have made it ready to learn, with what they kept in `parent`."""
    torch.manual_seed(config.seed)  # New adapters begin at random.
    return methods.prepare(model, _state(parent))


def rounded(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` in `dtype`. Raises `TreeringError`, with its `name`, where a number is too large for that."""
    found = weight.to(dtype)
    if not found.isfinite().all():
        raise TreeringError(
            f"{name} has learned {float(weight.abs().max()):.6g}, and {dtype} ends at {torch.finfo(dtype).max:.6g}: "
            "set fp16: false, or a lower learning_rate"
        )
    return found


def _state(parent: Version | None) -> dict[str, torch.Tensor]:
    path = parent.folder / "state.safetensors" if parent else None
    if path is None or not path.exists():
        return {}
    from safetensors.torch import load_file

    return load_file(path)
