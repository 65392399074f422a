"""One candidate version in the making: what the parent knew, what is learned now, what is measured."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from treering import anything, early, experts, general, inherited, twins
from treering.batches import Batch, make_batch
from treering.evaluate import evaluate
from treering.features import features
from treering.files import fsync_tree, write_file
from treering.keep import FROM_FEATURES, FROM_LOSSES, ORDERED
from treering.lesson import Lesson, Pupil, prepared
from treering.methods import Methods, recall
from treering.model import Tokens, encode, load, load_tokenizer, save_weights, with_prompts
from treering.passes import losses
from treering.progress import bar
from treering.readings import Readings
from treering.registry import Version
from treering.results import BEST, PARENT_RESULTS, RESULTS, Result, read_best, read_results, write_results
from treering.room import keep_to_limit, peak_gpu_memory_mb, peak_memory_mb
from treering.router import OWN, Router, Shown
from treering.scoring import conditions, metric_for, scorers, wanted
from treering.train import teach
from treering.written import Writer, Written

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from treering.config import Config
    from treering.data.example import Example, Message
    from treering.plan import Plan
    from treering.schedule import Step
    from treering.stop import Stop
    from treering.workspace import Workspace


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
        self.scorers = scorers(config, ws.root)
        torch.set_num_threads(plan.machine["threads"])
        keep_to_limit()
        self.readings = Readings(staging)
        self.tokenizer = load_tokenizer(base, config.trust_remote_code)
        inherited.check(parent, config)
        self.memory = inherited.memory(parent, config)
        measured: dict[str, list[str]] = parent.manifest["held_out"] if parent else {}
        untrue = ws.catalog.superseded([*self.memory.rows, *(id for ids in measured.values() for id in ids)])
        self.memory.drop(untrue)
        self.held_out = {
            task: [id for id in [*measured.get(task, ()), *plan.fresh.get(task, ())] if id not in untrue]
            for task in {**measured, **plan.fresh}
        }
        held_out_ids = [id for ids in self.held_out.values() for id in ids]
        self.earlier = inherited.earlier(ws, parent) if "recall" in config.protect else {}
        self._knows_all = inherited.knows_all(ws, parent)
        earlier_ids = [id for ids in self.earlier.values() for id in ids]
        wanted = list(dict.fromkeys([*plan.row_ids, *self.memory.rows, *held_out_ids, *earlier_ids]))
        self.examples: dict[str, Example] = ws.catalog.examples(wanted)
        self.metrics: dict[str, str] = dict(parent.manifest["metrics"]) if parent else {}
        for task, ids in plan.rows.items():
            self.metrics.setdefault(task, metric_for([self.examples[id] for id in ids]))
        self.general = general.read(config, ws.root, self.tokenizer, plan.general)
        self.pupil = Pupil(
            load(base, config, parent),
            base,
            parent,
            ws.root,
            plan.machine["threads"],
            cast(int, self.tokenizer.pad_token_id),
            {},
            list(self.general),
            stop,
            quiet,
        )
        self.lessons: list[Lesson] = []
        """What is taught; the first has most rows. Known once prepared."""
        self.past = recall.of(self.pupil.model)
        """What the model recalls; None: nothing."""
        self.shown, self.classes = Shown(torch.empty(0), ()), dict[str, str]()
        """What a router is to know of the new rows, and the class of each by its id."""
        self.merged = twins.Merged()
        self.log: list[dict[str, float]] = []
        self._begun: Lesson | None = None

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

    def prepare(self, write: Callable[[Writer], Written] = Writer.write) -> None:
        """Decide the lessons, and what is taught at each of their steps; make the model ready for them.

        `write` has the parent write what is replayed of its hand.
        """
        if self.config.adapter_composition == "experts" or "recall" in self.config.protect:
            self.shown = self._shown(self.plan.rows)
            self.classes = dict(zip(self.plan.row_ids, self.shown.classes, strict=True))
        self.lessons = self._by_expert() if self.config.adapter_composition == "experts" else [self._lesson()]
        new = self._pair if self.config.stage == "dpo" else self._tokens
        remembered = {id: self._tokens(id) for id in self.memory.rows}  # Pairs by their chosen answers.
        self.pupil.rows = {id: new(id) for id in self.plan.row_ids} | remembered | self.general
        for lesson in self.lessons:
            self.turn_to(lesson)
            written = write(
                Writer(lesson, self.tokenizer, self.examples, [i for ids in self.held_out.values() for i in ids])
            )
            self.examples |= written.rows
            texts = {**written.rows, **written.answers}
            lesson.take(written, {id: self._encoded(id, row) for id, row in texts.items()})
            lesson.plan(self._about)

    def choose_rate(self) -> None:
        """Settle the learning rate of each lesson."""
        for lesson in self.lessons:
            self.turn_to(lesson)
            lesson.choose_rate()

    def learn(self, track: Callable[[Mapping[str, float]], None] | None = None) -> list[dict[str, float]]:
        """Go through the lessons, one after the other; returns the log, an entry a step taken.

        `track` is given each entry when it is finished, and what was measured on the rows kept aside.
        """
        for lesson in self.lessons:
            self.turn_to(lesson)
            later = partial(_later, steps=len(self.log))
            lesson.learn(track and partial(_told, track, later))
            self.log += map(later, lesson.log)
        if self.taught:
            owners = {self.shown.classes[at]: choice.expert for choice in self.taught for at in choice.rows}
            weights = {choice.expert: one.weights for choice, one in zip(self.taught, self.lessons, strict=True)}
            experts.keep(self.model, weights, self.shown, owners)
        if "recall" in self.config.protect:
            self._recall()
        else:
            self.past = None
        recall.attach(self.model, self.past)
        return self.log

    def _recall(self) -> None:
        """Have recall know the new rows too; where the parent had none, all that its lineage learned."""
        known, before = experts.of(self.model), self.past and self.past.router
        if known is not None:  # Their router knows the rows already, but may lack the texts of earlier labels.
            known.router.answers = {**self._named(self.earlier)[1], **known.router.answers}
        elif before is None and self.earlier:
            earlier = self._shown(self.earlier)
            before = Router(earlier.vectors.shape[1])
            before.learn(earlier, dict.fromkeys(earlier.classes, OWN))
        router = known.router if known else before or Router(self.shown.vectors.shape[1])
        if known is None:
            router.learn(self.shown, dict.fromkeys(self.shown.classes, OWN))
        router.whole = self._knows_all
        self.past = recall.Recall(self.config, router)

    def merge_alike(self) -> None:
        """Have one expert answer where two are alike, of those taught and their likeliest twins."""
        if not self.taught:
            return
        taught = [choice.expert for choice in self.taught]
        before = self.parent.experts if self.parent else {}
        numbers = count()

        def measure(ids: Sequence[str]) -> list[float]:
            rows = [self.pupil.rows[id] for id in ids]
            reading = self.readings.of("comparing experts", next(numbers))
            return losses(self.model, rows, self.config, self.pad_id, self.stop, reading)

        self.merged = twins.merge(self.model, taught, self.classes, self.memory, before, measure)
        known = experts.of(self.model)
        assert known is not None
        experts.put(self.model, known.adapters[self.merged.now(taught)[0]])

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
            self._take_logits()

    def _take_logits(self) -> None:
        """Store the logits of all remembered rows that have none yet, each row's from the expert that answers it."""
        known = experts.of(self.model)
        rows: dict[str | None, list[Tokens]] = {}
        for id, row in self.memory.rows.items():
            if id not in self.memory.teachers:
                expert = known.router.expert[experts.class_of(row.task, row.label)] if known else None
                rows.setdefault(expert, []).append(self._tokens(id))
        settings: dict[str, Any] = {"pad_id": self.pad_id, "stop": self.stop, "quiet": self.quiet}
        for number, (expert, own) in enumerate(sorted(rows.items(), key=lambda item: str(item[0]))):
            reading = self.readings.of("taking logits to remember", number)
            with experts.using(self.model, known, expert) if known else nullcontext():
                self.memory.teachers |= teach(
                    self.model, own, self.config, top_k=self.config.distill.top_k, reading=reading, **settings
                )

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

    def best(self) -> list[Result]:
        """The best results of each task until now, as far as they can be compared with today's."""
        return read_best(self.parent.folder) if self.parent and self._known() else []

    def write(
        self, base_name: str, results: Sequence[Result], best: Sequence[Result], log: Sequence[dict[str, float]]
    ) -> None:
        """Fill `folder` with what the version consists of, all but its report and manifest."""
        folder = self.folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        save_weights(self.model, self.tokenizer, folder, base_name)
        if self.taught:
            write = partial(save_weights, self.model, self.tokenizer, base_name=base_name)
            changed = self.merged.now([choice.expert for choice in self.taught])
            experts.save(self.model, folder, changed, self.parent, write)
        elif self.past is not None and self.past.router is not None:
            self.past.router.save(folder)
        self.memory.save(folder)
        write_results(folder / RESULTS, results)
        write_results(folder / BEST, best)
        write_file(folder / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in log).encode())
        shutil.copyfile(self.staging / PARENT_RESULTS, folder / PARENT_RESULTS)
        state = self.main.methods.after_update(self.model, self._learned)
        if state:
            from safetensors.torch import save_file

            save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "state.safetensors")
        fsync_tree(folder)  # Here, not in the commit, so that a rollback need not wait for it.

    @property
    def model(self) -> PreTrainedModel:
        """The model, as far as it is."""
        return self.pupil.model

    @property
    def main(self) -> Lesson:
        """The lesson with most rows, whose adapter, or what it was merged to, is the version's own."""
        return self.lessons[0]

    @property
    def taught(self) -> list[experts.Choice]:
        """The experts that are taught, a lesson each; empty: there are none."""
        return [lesson.expert for lesson in self.lessons if lesson.expert is not None]

    @property
    def aside(self) -> list[str]:
        """The new rows that are not learned but measured."""
        return [id for lesson in self.lessons for id in lesson.aside]

    @property
    def steps(self) -> list[Step]:
        """All steps, lesson after lesson."""
        return [step for lesson in self.lessons for step in lesson.steps]

    @property
    def taken(self) -> list[Step]:
        """The steps that were taken: all, but where training stopped early."""
        return [step for lesson in self.lessons for step in lesson.taken]

    @property
    def train_seconds(self) -> float:
        """Of all training."""
        return sum(lesson.seconds for lesson in self.lessons)

    @property
    def trainable_parameters(self) -> int:
        """How many numbers this update can change."""
        return sum(lesson.trainable_parameters for lesson in self.lessons)

    @property
    def folder(self) -> Path:
        """Where the version takes shape."""
        return self.staging / "version"

    @property
    def peaks(self) -> tuple[float, float | None]:
        """The most memory that was held, in MB, by all processes together, and GPU memory by the one that had most."""
        own, gpu = peak_memory_mb(), peak_gpu_memory_mb()
        gpus = [gpu, *(process.peak_gpu_memory_mb for process in self.main.processes)]
        most = max((peak for peak in gpus if peak is not None), default=None)
        return own + sum(process.peak_memory_mb for process in self.main.processes), most

    @property
    def pad_id(self) -> int:
        """The token that fills rows up to the length of their batch."""
        return self.pupil.pad_id

    @property
    def stop(self) -> Stop | None:
        """Asked before each piece of work whether to go on."""
        return self.pupil.stop

    @property
    def quiet(self) -> bool:
        """Whether no bars are shown."""
        return self.pupil.quiet

    def _tokens(self, id: str) -> Tokens:
        return self._encoded(id, self.examples[id])

    def _pair(self, id: str) -> Tokens:
        """The row with its rejected answer, if it has one."""
        chosen, rejected = self.examples[id], self.examples[id].rejected
        if rejected is None:
            return self._tokens(id)
        row, other = (encode(self.tokenizer, one, last_only=True) for one in (chosen, rejected))
        return replace(row, rejected=other)

    def _encoded(self, id: str, example: Example) -> Tokens:
        row = replace(encode(self.tokenizer, example), id=id)
        return with_prompts(row) if self.config.train_on_prompt else row

    def _known(self) -> list[Result]:
        """The results that the parent was made with, as far as they can be compared with today's."""
        if self.parent is None or self.parent.manifest["evaluation"] != conditions(self.config, self.root):
            return []
        return read_results(self.parent.folder / RESULTS)

    def _lesson(self) -> Lesson:
        """All rows for the one model."""
        replayed = self.memory.part(lambda _: True)
        return Lesson(self.pupil, self.config, self.plan.row_ids, replayed, self.staging, self.readings)

    def _by_expert(self) -> list[Lesson]:
        """Each expert the rows that are for it; all begin where the parent's experts are, whatever their order."""
        row_ids = self.plan.row_ids
        tasks = [task for task, ids in self.plan.rows.items() for _ in ids]
        known = experts.of(self.model)
        adapters = known.adapters if known else {}
        self.pupil.model = prepared(self.model, Methods(self.config), self.config, self.parent)
        fresh = experts.weights(self.model)
        found: list[Lesson] = []
        for choice in experts.split(known, self.shown.vectors, tasks, self.shown.classes):
            folder = self.staging / choice.expert if found else self.staging
            found.append(
                Lesson(
                    self.pupil,
                    self.config,
                    [row_ids[at] for at in choice.rows],
                    experts.part(self.memory, choice.expert, known),
                    folder,
                    Readings(folder) if found else self.readings,
                    choice,
                    adapters[choice.begins] if choice.begins is not None else fresh,
                )
            )
            folder.mkdir(exist_ok=True)
        return found

    def turn_to(self, lesson: Lesson) -> None:
        """Have the model be ready for this lesson."""
        if self._begun is not lesson:
            lesson.begin()
            self._begun = lesson

    def _shown(self, rows: Mapping[str, Sequence[str]]) -> Shown:
        """What a router is to know of these rows, ids by task."""
        ids = [id for of_task in rows.values() for id in of_task]
        known, past = experts.of(self.model), self.past
        router = known.router if known else past.router if past else None
        told = [*(router.forms if router else ()), *self.shown.forms]
        asked = anything.forms(map(self.examples.__getitem__, ids), told)
        every = [prompt for prompts in asked.values() for prompt in prompts]
        return Shown(
            self._about(ids),
            *self._named(rows),
            self._read(every, "reading prompts about anything"),
            tuple(asked),
        )

    def _named(self, rows: Mapping[str, Sequence[str]]) -> tuple[list[str], dict[str, str]]:
        """The classes of these rows, and the texts of those classes that are labels."""
        classes, answers = list[str](), dict[str, str]()
        for task, ids in rows.items():
            for example in map(self.examples.__getitem__, ids):
                label = example.label if self.metrics[task] == "exact_match" else ""
                classes.append(experts.class_of(task, label))
                if label:
                    answers[classes[-1]] = example.answer
        return classes, answers

    def _about(self, ids: Sequence[str]) -> torch.Tensor:
        """The features of these rows' prompts, `[rows, size]`."""
        return self._read([self.examples[id].prompt for id in ids], "reading prompts")

    def _read(self, prompts: Sequence[Sequence[Message]], title: str) -> torch.Tensor:
        settings: dict[str, Any] = {"stop": self.stop, "reading": self.readings.of(title)}
        with bar(title, len(prompts), self.quiet) as advance:
            return features(self.model, self.tokenizer, prompts, self.config, advance=advance, **settings)

    def _learned(self) -> list[Batch]:
        """The new rows, each a batch of its own."""
        return [make_batch([self._tokens(id)], self.pad_id, self.model.device) for id in self.plan.row_ids]

    def _score(self, rows: Sequence[tuple[str, str]], title: str) -> list[Result]:
        pairs = [(self.examples[id], task) for id, task in rows]
        return evaluate(
            self.model,
            self.tokenizer,
            pairs,
            wanted(self.config, self.metrics),
            self.config,
            scorers=self.scorers,
            title=title,
            stop=self.stop,
            quiet=self.quiet,
            reading=self.readings.of(title),
        )


def _later(entry: Mapping[str, float], steps: int) -> dict[str, float]:
    """An entry of the log, after the `steps` of earlier lessons."""
    return {**entry, "step": entry["step"] + steps}


def _told(
    track: Callable[[Mapping[str, float]], None],
    later: Callable[[Mapping[str, float]], Mapping[str, float]],
    entry: Mapping[str, float],
) -> None:
    track(later(entry))
