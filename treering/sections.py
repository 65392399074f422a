"""The groups of settings in `treering.yaml`, each checked when built."""

from __future__ import annotations

import shlex
from typing import Annotated, Any, Literal, TypeGuard
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from treering.errors import near
from treering.own import is_own
from treering.scoring import METRICS


class Section(BaseModel):
    """A group of settings: no unknown keys, nothing changed after it was checked."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


def is_section(kind: Any) -> TypeGuard[type[Section]]:
    """Whether a setting of this type is a group."""
    return isinstance(kind, type) and issubclass(kind, Section)


def _share_or_count(value: object) -> object:
    if isinstance(value, str) and value.endswith("%"):
        try:
            share = float(value[:-1])
        except ValueError:
            raise ValueError("write a share as a number and %, such as 2%") from None
        if not 0 <= share <= 100:
            raise ValueError("a share lies between 0% and 100%")
        return f"{share:g}%"
    if isinstance(value, bool) or not isinstance(value, int | str) or (isinstance(value, int) and value < 0):
        raise ValueError("write auto, a number of rows (0 or more) or a share such as 2%")
    return value


Contradictions = Literal["auto", "supersede", "keep-both", "quarantine"]


class DedupConfig(Section):
    """What becomes of rows that say what others say."""

    near: Literal["drop", "keep"] = "drop"
    """Training rows that say nearly the same as a stored one, with the same answer: left out (`drop`) or learned too
    (`keep`). Rows with different numbers are never near. What is near a held-out row is never learned."""

    threshold: float = Field(0.8, ge=0.5, le=1)
    """How much of the words of either of two questions (or long answers) must be in both: the Jaccard index."""

    contradictions: Contradictions | dict[str, Contradictions] = "auto"
    """Rows that answer the same question with something else: the newest wins (`supersede`: the older one leaves
    training, memory and held-out side), all are learned (`keep-both`), or none that comes (`quarantine`). `auto` is
    `quarantine` within one ingest and `supersede` across them. A policy a task may be given, `*` for all others:
    `{prices: supersede, "*": auto}`."""

    def policy(self, task: str) -> Contradictions:
        """What to do in `task`."""
        if isinstance(self.contradictions, str):
            return self.contradictions
        return self.contradictions.get(task, self.contradictions.get("*", "auto"))


class MemoryConfig(Section):
    """The bounded set of old rows that updates replay."""

    size: Annotated[Literal["auto"] | int | str, BeforeValidator(_share_or_count)] = "auto"
    """Rows kept: a count, a share of all rows seen such as `2%`, or `auto`: for each task the larger of 2% of its
    rows and two rows a label."""

    policy: Literal["balanced", "reservoir", "hard", "diverse", "forgotten", "ageing"] = "balanced"
    """What to keep: `balanced` (equal quotas per task, and per label inside it; a reservoir inside a quota),
    `reservoir` (a uniform sample of all rows seen), or the quotas of `balanced` with another order inside them: `hard`
    (highest loss first, extreme ones last), `diverse` (those whose mean is that of all), `forgotten` (largest rise of
    loss since they were learned), `ageing` (newest first). `docs/methods.md` has more."""

    replay_share: float = Field(0.5, ge=0, lt=1)
    """Share of the rows of an epoch that are replayed from memory."""

    answers: Literal["stored", "own"] = "stored"
    """Which answers remembered prompts are replayed with: the `stored` ones, or what the parent answers now (`own`),
    unless that does not end within `eval.max_new_tokens`. Its errors are repeated with it."""

    generate: Annotated[int | str, BeforeValidator(_share_or_count)] = 0
    """Rows of what it learned earlier that the parent writes itself before an update, to be replayed like remembered
    ones: a count at most, or a share of the new rows such as `50%`. They are not kept. Wants `train_on_prompt` from the
    first update on, unless the base model writes such prompts by itself."""

    generate_temperature: float = Field(1.0, ge=0)
    """With `generate`: temperature at which the user's turns are drawn; the answers are greedy."""

    generate_top_p: float = Field(0.95, gt=0, le=1)
    """With `generate`: of the likeliest tokens, as many as hold this probability are drawn from."""

    generate_confidence: float = Field(-0.5, le=0)
    """With `generate`: least mean log-probability of a token of the answer, in nats, for the row to be replayed."""

    mix: Literal["uniform", "interference", "similarity"] = "uniform"
    """Which rows are replayed more often: none (`uniform`), those whose loss rises most in a short training on new rows
    (`interference`), or those nearest to new rows (`similarity`). Every row comes now and then."""

    general: str | None = None
    """File of general text that is replayed too, JSON Lines with `text` or chat rows; a relative path begins at the
    workspace."""

    general_share: float = Field(0.1, gt=0, lt=1)
    """With `general`: its share of the rows of an epoch. Of text all tokens are learned, so it weighs more than short
    answers do."""

    @field_validator("generate")
    @classmethod
    def _known_count(cls, value: int | str) -> int | str:
        if isinstance(value, str) and not value.endswith("%"):
            raise ValueError("write a number of rows or a share of the new ones such as 50%")
        return value

    @field_validator("size")
    @classmethod
    def _known_size(cls, value: int | str) -> int | str:
        if isinstance(value, str) and value != "auto" and not value.endswith("%"):
            raise ValueError("write auto, a number of rows or a share such as 2%")
        return value


class DistillConfig(Section):
    """Distillation: rows keep the answer distribution that a teacher gave them."""

    teacher: Literal["stored", "parent"] = "stored"
    """Who that is: the model that had just learned the row, by its `stored` top logits, or the `parent`, by what it
    makes of the row before training begins."""

    rows: Literal["replayed", "new", "both"] = "replayed"
    """Which rows; `new` ones with the `parent` as teacher, whose answers are held as well, so take a low weight."""

    weight: float = Field(0.25, ge=0)
    """Weight of the distillation term beside the cross entropy of the same step."""

    temperature: float = Field(2.0, gt=0)
    """Softening of teacher and student."""

    top_k: int = Field(16, ge=1, le=16)
    """Logits stored for each answer token; the parent's are never stored."""


class RecallConfig(Section):
    """Recall: labels of rows like the prompt have part in the choice of each token of an answer."""

    weight: float = Field(2.0, gt=0)
    """Power that the chances of labels are taken to beside those of the model; 1: as they were for rows not yet
    learned."""

    fallback: bool = True
    """The base model answers prompts that are unlike all that was learned, so that what else it can do stays as it was;
    false: what was learned has part in all answers. Not after an adapter that was made elsewhere."""


class LwfConfig(Section):
    """Learning without forgetting: how the parent ranks the other answers to new rows is kept."""

    weight: float = Field(0.02, ge=0)
    """Weight of the term beside the cross entropy of the same step."""

    temperature: float = Field(2.0, gt=0)
    """Softening of parent and student."""


class OloraConfig(Section):
    """Orthogonal LoRA: what an update adds reads the input in other directions than what earlier ones added."""

    weight: float = Field(0.5, ge=0)
    """Weight of the overlap, summed over all layers, beside the cross entropy of a step."""


class OsfConfig(Section):
    """Learning in the directions that weights use least (`finetuning_type: osf`)."""

    effective_rank: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Largest singular values of each linear layer that stay, with their directions: a count, or a share of all."""


class EmaConfig(Section):
    """The version gets the average of the weights over the last steps."""

    decay: float = Field(0.999, gt=0, lt=1)
    """How much of the average each step leaves; until it has risen that far, the last tenth of the steps counts."""


class ReptileConfig(Section):
    """Now and then the weights go back part of the way that they went since the last time."""

    steps: int = Field(5, ge=1)
    """Optimiser steps from one time to the next."""

    rate: float = Field(0.5, gt=0, lt=1)
    """Share of the way that is kept."""


class InterpolateConfig(Section):
    """The version gets weights between those of its parent and those that were trained."""

    share: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = "auto"
    """How far from the parent (0) to what was trained (1); `auto`: where the loss is lowest on new and remembered rows
    together, of 0.2 to 1 in steps of 0.2."""


class EwcConfig(Section):
    """Elastic weight consolidation: weights that matter to old rows are held where the parent has them."""

    weight: float = Field(1.0, ge=0)
    """Weight of the term: half the sum of all squared distances to the parent's weights, each times its importance."""

    gamma: float = Field(0.9, ge=0, le=1)
    """What is left of the old importance when that of an update is added, which has a mean of 1."""


class L2Config(Section):
    """L2 to the start: all weights are held where the parent has them."""

    weight: float = Field(0.1, ge=0)
    """Weight of the term: half the sum of all squared distances to the parent's weights."""


class SiConfig(Section):
    """Synaptic intelligence: weights whose way has lowered the loss are held where the parent has them."""

    weight: float = Field(0.1, ge=0)
    """Weight of the term: the sum of all squared distances to the parent's weights, each times its importance."""


class MergeConfig(Section):
    """The version gets what its update and those before it made of the weights, merged."""

    method: Literal["ties", "dare", "linear"] = "ties"
    """How: a weighted mean (`linear`); the same after most of what is new was dropped at random, and the rest scaled up
    for it (`dare`); or, of the largest numbers of both, a mean of those whose sign prevails (`ties`)."""

    density: float = Field(0.5, gt=0, lt=1)
    """With `ties` and `dare`: share of the numbers that stay."""

    weight: Annotated[float, Field(gt=0, lt=1)] | Literal["auto"] = "auto"
    """What the newest update counts beside all before it together; `auto`: 1 / updates, so that each counts alike."""


class TaskGate(Section):
    """What one task asks for; what is not set is as for all tasks."""

    margin: float | None = Field(None, ge=0, le=1)
    best_margin: float | None = Field(None, ge=0, le=1)
    floor: float | None = Field(None, ge=0, le=1)
    min_score: float | None = Field(None, ge=0, le=1)


class GateConfig(Section):
    """When a candidate may become current."""

    margin: float = Field(0.05, ge=0, le=1)
    """Largest loss of score on an old task that still counts as no worse."""

    best_margin: float | None = Field(None, ge=0, le=1)
    """The same against the best results that the task ever had, so that small losses do not add up; twice the `margin`
    by default."""

    floor: float = Field(0.25, ge=0, le=1)
    """A drop on any old task above this holds the candidate, however few rows the task has."""

    min_score: float | None = Field(None, ge=0, le=1)
    """Lowest score that a candidate may have on an old task, whatever it was before."""

    negative_flips: float | None = Field(None, ge=0, le=1)
    """Largest share of the old rows that may be right before and wrong after, though others come right."""

    tasks: dict[str, TaskGate] = Field(default_factory=dict)
    """Limits of single tasks, where they are others; one with a `margin` of its own is not judged together with the
    other old tasks."""

    min_gain: float = Field(0.0, ge=0, le=1)
    """Smallest gain of score on the new held-out rows."""

    confidence: float = Field(0.95, gt=0.5, lt=1)
    """One-sided confidence of each bound."""

    resamples: int = Field(2000, ge=100)
    """Bootstrap resamples."""

    def sets_margin(self, task: str) -> bool:
        """Whether that task has a margin of its own."""
        return task in self.tasks and self.tasks[task].margin is not None

    def of(self, task: str) -> GateConfig:
        """The limits of that task; `best_margin` is twice the `margin` where neither says it."""
        own = self.tasks[task].model_dump(exclude_none=True) if task in self.tasks else {}
        found = self.model_copy(update=own)
        margin = 2 * found.margin if found.best_margin is None else found.best_margin
        return found.model_copy(update={"best_margin": min(1.0, margin)})


class EvalConfig(Section):
    """How held-out rows are scored."""

    batch_size: int = Field(64, ge=1)
    """Rows scored at once; fewer where they are long."""

    max_new_tokens: int = Field(128, ge=1)
    """Longest generated answer, in tokens; rows of a task with a label set stop two tokens past their label."""

    metrics: dict[str, str] = Field(default_factory=dict)
    """The metric of a task, by task, `*` for all others: `exact_match`, `token_f1`, `rouge_l`, `chrf`, or a function
    of your own, `FILE.py:FUNCTION`. A task that is not named has one by its rows: `exact_match` for labels,
    `token_f1` for open answers. Plain text is always scored by its tokens."""

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, value: dict[str, str]) -> dict[str, str]:
        if unknown := [name for name in value.values() if name not in METRICS and not is_own(name)]:
            known = f"{', '.join(METRICS)}, or FILE.py:FUNCTION"
            raise ValueError(f"{unknown[0]} is no metric{near(unknown[0], METRICS)}; known: {known}")
        return value


class ServeConfig(Section):
    """How `treering serve` answers."""

    engine: Literal["builtin", "vllm"] = "builtin"
    """What generates: treering itself, on any machine, or a vLLM server (`docs/serving.md` says how)."""

    vllm_url: str | None = None
    """Address of a vLLM server to attach to, such as `http://127.0.0.1:8001`; with none, one is started."""

    vllm_key_file: str | None = None
    """File that holds the API key of the server attached to; a relative path begins at the workspace."""

    vllm_python: str | None = None
    """Python that has vLLM installed, to start one; the one treering runs on by default."""

    vllm_arguments: str | None = None
    """What the vLLM server that is started gets on its command line besides, such as `--tensor-parallel-size 2`."""

    temperature: float = Field(0.0, ge=0)
    """Temperature of requests that name none; 0, the likeliest token, is how versions are judged."""

    max_new_tokens: int = Field(512, ge=1)
    """Longest answer of requests that set no limit, in tokens."""

    max_batch_size: int = Field(32, ge=1)
    """Answers generated at once."""

    max_queue: int = Field(256, ge=0)
    """Requests that may wait beyond those; more get HTTP status 429."""

    max_loaded_versions: int = Field(4, ge=1)
    """Versions kept in memory beside the base model; the least recently used one goes, but never `current`. While
    another becomes current, or is asked for where only `current` fits, there is one more."""

    max_body_bytes: int = Field(1_000_000, ge=1)
    """Largest request."""

    request_timeout: float = Field(300.0, gt=0)
    """Seconds after which a request fails."""

    shutdown_timeout: float = Field(30.0, ge=0)
    """Seconds that requests under way have to finish once the server is told to end; what is left then fails."""

    requests_per_minute: int | None = Field(None, ge=1)
    """Limit of each key, and of all together who need none; none by default."""

    feedback: Literal["off", "review", "corrections", "all"] = "review"
    """What becomes of feedback: nothing is taken (`off`); it waits for `treering feedback accept` (`review`);
    corrections become rows by themselves, or answers rated `up` as well (`all`)."""

    log_contents: bool = False
    """Write questions and answers into the access log."""

    telemetry: Literal["otlp"] | None = None
    """`otlp` sends a trace span a request where `OTEL_EXPORTER_OTLP_ENDPOINT` says (`pip install 'treering[otel]'`)."""

    @field_validator("vllm_url")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("write an address that begins with http:// or https://")
        return value and value.rstrip("/").removesuffix("/v1")

    @field_validator("vllm_arguments")
    @classmethod
    def _words(cls, value: str | None) -> str | None:
        shlex.split(value or "")  # Raises for an open quotation mark.
        return value

    @model_validator(mode="after")
    def _one_server(self) -> ServeConfig:
        if self.vllm_url is not None and (self.vllm_python or self.vllm_arguments):
            raise ValueError("vllm_python and vllm_arguments start a server, vllm_url names one that runs: drop either")
        if self.vllm_key_file is not None and self.vllm_url is None:
            raise ValueError("vllm_key_file is for the server at vllm_url: set that too, or drop it")
        return self


class AutomateConfig(Section):
    """When `treering watch` updates by itself. Each of `schedule`, `min_rows`, `drift` and `max_age_hours` that is set
    starts an update of what waits; with none of them, new rows do so at once. Times are local.
    """

    settle_seconds: float = Field(5.0, ge=0)
    """A file of the inbox counts once it has not changed for so long."""

    schedule: str | None = None
    """Times at which to update, in cron syntax, such as `0 2 * * 1-5`; one missed while the machine was off is made
    up for."""

    min_rows: int | None = Field(None, ge=1)
    """Update once so many rows wait."""

    drift: float | None = Field(None, gt=0, lt=1)
    """Update once the words of the rows that wait differ from those learned by more than so many bits
    (Jensen-Shannon divergence, less what chance gives; 0 to 1)."""

    max_age_hours: float | None = Field(None, gt=0)
    """Update once the oldest row has waited so long."""

    quiet_hours: str | None = None
    """No update starts or goes on in these hours, such as `08:00-18:00`; one that runs is stopped at a checkpoint and
    resumed afterwards."""

    updates_per_day: int | None = Field(None, ge=1)
    """Updates in a day, those that look for the cause of a hold included."""

    minutes_per_day: float | None = Field(None, gt=0)
    """Minutes that updates may run in a day; one that has used them up is stopped at a checkpoint and resumed the next
    day."""

    max_failures: int = Field(3, ge=1)
    """Failures in a row after which nothing is tried until `treering watch --resume`."""

    on_event: str | None = None
    """Command run on every event, which it gets as a JSON object on standard input. No shell is involved."""

    webhook: str | None = None
    """Address that gets every event by POST, signed as standardwebhooks.com says."""

    webhook_secret_file: str | None = None
    """File that holds the webhook's secret; a relative path begins at the workspace."""

    @field_validator("schedule")
    @classmethod
    def _cron(cls, value: str | None) -> str | None:
        if value is not None:
            from treering.automate.rules import cron

            cron(value)
        return value

    @field_validator("quiet_hours")
    @classmethod
    def _hours(cls, value: str | None) -> str | None:
        if value is not None:
            from treering.automate.rules import hours

            hours(value)
        return value

    @field_validator("webhook")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is None:
            return value
        if not value.startswith(("http://", "https://")):
            raise ValueError("write an address that begins with https:// or http://")
        try:
            parts = urlsplit(value)
            named = bool(parts.hostname) and parts.port != 0
        except ValueError:
            named = False
        if not named or not value.isascii() or not value.isprintable() or " " in value:
            raise ValueError("write an address with a host, such as https://example.com/hook, without blanks")
        if "@" in parts.netloc:
            raise ValueError("leave out the name and the password: the signature tells who sends")
        return value

    @field_validator("on_event")
    @classmethod
    def _command(cls, value: str | None) -> str | None:
        if value is not None and not shlex.split(value):
            raise ValueError("write a command, such as notify-send treering, or leave it out")
        return value

    @model_validator(mode="after")
    def _signed(self) -> AutomateConfig:
        if (self.webhook is None) != (self.webhook_secret_file is None):
            raise ValueError("webhook and webhook_secret_file go together: set both or none")
        return self
