"""A whole run: references and cold phases one by one, then all that fit into memory take turns."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ...errors import KilnError
from ..machine import describe_machine
from ..records.record import NoiseReport, Record, Tool
from ..records.store import append_record
from .assemble import RunFacts, make_record, new_run_id
from .energy import EnergyUse, Meter, find_meter, measure_idle
from .judging import (
    NOT_CHECKED,
    Reference,
    draw_prompts,
    draw_reference,
    explain_failure,
    forget_files,
    judge_components,
    judge_pictures,
)
from .lane import Lane
from .lane_groups import grouped
from .measure import turns, warm_up
from .noise import NoiseWatch, Snapshot, aa_difference, aa_floor, judge_aa, judge_machine
from .noise_floor import machine_id, noise_floor, remember_floor
from .partial import Partials
from .plan import Plan, Say, Tools

UNCHECKED = f"{NOT_CHECKED}: --no-parity"
_SAVE_EVERY_S = 5.0


@dataclass(frozen=True)
class Outcome:
    """A record, and whether it is invalid for a reason that its user did not ask for."""

    record: Record
    failed: bool


class Interrupted(KilnError):
    """The run was stopped; what it measured is kept."""

    exit_code = 130


@dataclass
class Run:
    """One run of ``kiln bench run``."""

    plan: Plan
    say: Say
    tools: Tools = field(default_factory=Tools)

    def __post_init__(self) -> None:
        self.options = self.plan.options
        self.partials = Partials(self.options.directory)
        machine = describe_machine()
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        environment = self.tools.environment()
        self.machine = machine_id(environment)
        run = self.partials.begin(self.plan, new_run_id(), resume=self.options.resume)
        tool = Tool(machine.kiln, machine.commit)
        self.facts = RunFacts(run, created, tool, environment, self.options.command)
        self.references: dict[str, Reference | str] = {}
        self.outcomes: list[Outcome] = []
        self._idle: dict[str, float | None] = {}
        self._saved = 0.0

    def measure(self) -> list[Outcome]:
        """Measure everything that is planned.

        Returns:
            One outcome for each configuration, in the order in which they were finished.

        Raises:
            Interrupted: Ctrl-C; what was measured is kept for ``--resume``.
            StorageError: the results folder cannot be written.
        """
        lanes = [lane for lane in self._lanes() if not self.partials.is_done(lane.configuration.key)]
        try:
            for lane in lanes:
                self._attempt(lane, self._before)
            for group in grouped(lanes, self.say):
                self._measure_group(group)
        except KeyboardInterrupt:
            for lane in lanes:
                self._keep(lane)
            kept = sum(len(lane.samples) for lane in lanes)
            raise Interrupted(
                f"stopped; {len(self.outcomes)} records are written and {kept} timed batches kept in "
                f"{self.partials.folder}; go on with --resume"
            ) from None
        finally:
            for lane in lanes:
                lane.kill()  # none is alive unless the run was cut short
        self.partials.finish()
        for lane in lanes:
            forget_files(lane)
        return self.outcomes

    def _lanes(self) -> list[Lane]:
        made = []
        for configuration in self.plan.configurations:
            bundle = self.plan.bundles[configuration.bundle]
            folder = self.partials.scratch / configuration.key
            lane = Lane(configuration, bundle, folder, self.options, self.tools, self.say)
            self.partials.restore(lane)
            made.append(lane)
        if self.options.aa and made:
            first = made[0]
            folder = self.partials.scratch / f"{first.configuration.key}-aa"
            twin = replace(first, folder=folder, twin=True, warmups=[], samples=[], effective={}, reasons=[])
            twin = replace(twin, remarks=[], noise=[], energy=EnergyUse(None))
            made.insert(1, twin)
        return made

    def _attempt(self, lane: Lane, action: Callable[[Lane], None]) -> None:
        """Whatever goes wrong with one configuration becomes its reason; the others go on."""
        if lane.failed:
            return
        try:
            action(lane)
        except (KilnError, OSError, ValueError, KeyError, TypeError) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            if not isinstance(error, KilnError):
                text = f"{type(error).__name__}: {text}"
            lane.fail(text)

    def _before(self, lane: Lane) -> None:
        """What is done with each alone: the peer's conversion, the cold phase, parity of components."""
        lane.prepare()
        if lane.configuration.requested.kind == "peer":
            self._give_folder(lane)
        if lane.options.cold and (lane.phases.compile_cold is None or not (lane.folder / "cache").is_dir()):
            self.say(f"{lane.name}: cold")
            dropped = lane.load_cold()
            if not dropped:
                lane.remarks.append("compile_cold: the system's page cache could not be dropped")
        if lane.twin:
            return
        if not self.options.parity:
            lane.reasons.append(UNCHECKED)
            return
        reference = self._reference(lane)
        if isinstance(reference, str):
            lane.reasons.append(f"{NOT_CHECKED}: {reference}")
            return
        if not lane.parity.gates:
            self.say(f"{lane.name}: parity of components")
            judge_components(lane, reference, self.partials.recordings)

    def _give_folder(self, lane: Lane) -> None:
        from ..peers.folder import write_folder

        at = self.partials.scratch / f"model-{lane.bundle.content_digest[:16]}"
        lane.model = write_folder(lane.bundle, at)
        if lane.phases.convert is None:
            self.say(f"{lane.name}: convert")
            lane.convert()

    def _reference(self, lane: Lane) -> Reference | str:
        """The reference for a lane's workload, or why there is none."""
        against = self.plan.against
        workload = lane.configuration.workload
        key = f"{workload.model.digest} {workload.width}x{workload.height} {workload.batch} {workload.steps}"
        if key not in self.references:
            folder = self.partials.scratch / "references"
            try:
                self.references[key] = draw_reference(
                    lane.configuration, against or lane.bundle, folder, self.options, self.tools, self.say
                )
            except (KilnError, OSError, ValueError) as error:
                self.references[key] = f"the reference could not be drawn: {' '.join(str(error).split())}"
        return self.references[key]

    def _measure_group(self, lanes: Sequence[Lane]) -> None:
        """Load and warm up each, then take turns, then write the records."""
        for lane in lanes:
            self._attempt(lane, self._warm_up)
        running = [lane for lane in lanes if not lane.failed]
        self._meters(running)
        before = self._look(running)
        watch = NoiseWatch(before)
        for lane in turns(running, lambda lane: lane.wants):
            if self.options.delay_s:
                time.sleep(self.options.delay_s)
            self._attempt(lane, self._take_turn)
            watch.tick()
            self._save(lane)
        machine = judge_machine(before, self._look(running), watch.frequencies)
        for lane in running:
            self._attempt(lane, Lane.ask_memory)
        floor = self._floor(lanes)
        for lane in lanes:
            lane.close()
            if not lane.twin:
                self._finish(lane, machine, floor)

    def _warm_up(self, lane: Lane) -> None:
        self.say(f"{lane.name}: load")
        lane.load()
        first = draw_prompts(lane)
        lane.phases = replace(lane.phases, first_image=first[0].seconds)
        counter = itertools.count(len(first))
        warmups, stable = warm_up(lambda: lane.draw(next(counter)), first)
        lane.warmups += warmups
        if not stable:
            lane.noise.append(("noisy", f"not stable after {len(warmups)} warm-ups"))
        if self.options.parity and not lane.twin:
            self._judge(lane)
        self.say(f"{lane.label}: {warmups[-1].seconds:.3g} s a batch")

    def _judge(self, lane: Lane) -> None:
        reference = self._reference(lane)
        if isinstance(reference, str):
            return
        judge_pictures(lane, reference)
        if self.options.explain:
            self.say(f"{lane.name}: where it parts from the reference")
            explain_failure(lane, reference, self.partials.recordings)

    def _take_turn(self, lane: Lane) -> None:
        lane.energy.begin()
        sample = lane.draw(len(lane.samples))
        lane.energy.end(sample.seconds)
        lane.samples.append(sample)

    def _meters(self, lanes: Sequence[Lane]) -> None:
        """Find each lane's counter of energy, and measure once what the machine takes idle."""
        for lane in lanes:
            row = lane.effective.get("unet") or next(iter(lane.effective.values()), None)
            meter: Meter | None = find_meter(row.device) if row else None
            if meter and meter.method not in self._idle:
                self._idle[meter.method] = measure_idle(meter)
            lane.energy = EnergyUse(meter, self._idle.get(meter.method) if meter else None)

    def _look(self, lanes: Sequence[Lane]) -> Snapshot:
        return self.tools.snapshot(sum(lane.worker.cpu_seconds for lane in lanes if lane.worker))

    def _floor(self, lanes: Sequence[Lane]) -> float | None:
        """The noise floor: of this run's A/A pair, else the one remembered for this machine."""
        twin = next((lane for lane in lanes if lane.twin), None)
        pair = next((lane for lane in lanes if twin and not lane.twin), None)
        if twin and pair and twin.configuration.key == pair.configuration.key:
            found = aa_difference(pair.samples, twin.samples)
            if found is not None and not (twin.failed or pair.failed):
                floor = aa_floor(pair.samples, twin.samples)
                told = "too few to tell the noise floor" if floor is None else f"noise floor {floor:.2%}"
                self.say(f"A/A: two runs of {pair.label} differ by {found:.2%}; {told}")
                for lane in lanes:
                    lane.noise += judge_aa(found)
                if floor is not None:
                    remember_floor(self.machine, pair.configuration.workload.id, floor)
                    return floor
        return noise_floor(self.machine)

    def _finish(self, lane: Lane, machine: NoiseReport, floor: float | None) -> None:
        record = make_record(lane, self.facts, machine, floor)
        append_record(self.options.directory, record)
        self.partials.done(lane.configuration.key)
        failed = record.verdict == "invalid" and (
            set(lane.reasons) != {UNCHECKED} or not lane.samples or record.noise.verdict == "invalid"
        )
        self.outcomes.append(Outcome(record, failed))

    def _save(self, lane: Lane) -> None:
        """Keep samples now and then, so that even a killed run loses seconds."""
        if time.monotonic() - self._saved > _SAVE_EVERY_S:
            self._saved = time.monotonic()
            self._keep(lane)

    def _keep(self, lane: Lane) -> None:
        if not lane.twin and not self.partials.is_done(lane.configuration.key):
            self.partials.keep(lane, make_record(lane, self.facts, NoiseReport(), None))
