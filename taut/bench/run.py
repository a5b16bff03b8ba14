"""`taut bench` from its options to its report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from taut import auto
from taut.bench import cases, peers, plot, report, shapes, table
from taut.bench.cases import KINDS, UNCOUNTED, Case, Inputs
from taut.bench.measure import Point, frozen, measure, release
from taut.bench.report import Report
from taut.bench.subjects import Taut, make_model, packed_weights, quantized, shared_weights
from taut.config import DTYPES
from taut.errors import RequestError
from taut.hub import default_model
from taut.layers.moe import Experts
from taut.placement import pick_device
from taut.quant.config import BitsAndBytesConfig, named

LOGITS = ("last", "all")


@dataclass(frozen=True)
class Options:
    """What `taut bench` was asked for; None: a default that suits the device or the model."""

    model: str | None = None
    shape: str | None = None
    what: str | None = None
    lengths: str | None = None
    batches: str | None = None
    contexts: str | None = None
    new_tokens: int = 64
    logits: str = "last"
    dtype: str = "auto"
    device: str = "auto"
    peers: str = "transformers"
    repeats: int = 5
    json: Path | None = None
    plot: Path | None = None
    saved: Path | None = None
    revision: str | None = None
    local_files_only: bool = False
    load_in: str | None = None


def run(options: Options) -> bool:
    """Measure, and print the tables; whether no subject failed but by running out of memory. Everything
    about the options that can be wrong is found before a model is made.

    The JSON file is written again after every case, so that an interrupted run keeps what it has. With
    `saved`, such a file is shown and nothing is measured.
    """
    if options.saved is not None:
        found = _saved(options)
    else:
        found = measure_all(options, progress=lambda line: print(line, file=sys.stderr, flush=True))
    table.show(found)
    if options.plot is not None:
        for file in plot.draw(found, options.plot):
            print(file)
    return all(point.failed is None or point.out_of_memory for point in found.points)


def _saved(options: Options) -> Report:
    if options.plot is not None:
        plot.check(options.plot)
    if options != Options(saved=options.saved, plot=options.plot):
        raise RequestError("--from shows what was measured, all of it; give nothing but --plot with it")
    return Report.read(options.saved)


def measure_all(options: Options, progress: Callable[[str], None] = lambda _: None) -> Report:
    """The report of everything that `options` ask for; `progress` gets a line a case."""
    device = pick_device(options.device)
    shape = None if options.shape is None else shapes.find(options.shape)
    if shape is not None and options.model is not None:
        raise RequestError("--model and --shape both say what to measure; give one of them")
    source = None if shape is not None else options.model or default_model()
    loader = _loader(options, source) if shape is None else shape.auto
    wanted = _cases(options, loader != "AutoModel", device)
    dtype = _dtype(options.dtype)
    if shape is not None and dtype is None:
        dtype = torch.bfloat16
    if options.logits not in LOGITS:
        raise RequestError(f"--logits is {options.logits!r}; known: {', '.join(LOGITS)}")
    if options.repeats < 1:
        raise RequestError(f"--repeats is {options.repeats}; expected at least 1")
    packing = None if options.load_in is None else named(options.load_in)
    peers.require(options.peers, packed=packing is not None)
    if options.json is not None:
        report.check_writable(options.json)
    if options.plot is not None:
        plot.check(options.plot)

    span = max(case.span for case in wanted)
    if shape is not None:
        name = f"{options.shape} (random weights)"
        progress(f"{name} on {device}")
        model = make_model(shape, context=span, dtype=dtype, device=device)
    else:
        name = Path(source).name if Path(source).exists() else source
        progress(f"{name} on {device}")
        model = getattr(auto, loader).from_pretrained(
            source,
            dtype=dtype or "auto",
            device_map=device,
            revision=options.revision,
            local_files_only=options.local_files_only,
        )
        if span > model.config.context:
            raise RequestError(
                f"{name} has a context of {model.config.context} tokens, and a case takes {span}; lower "
                "--lengths, --contexts or --new-tokens"
            )
    subjects, notes = _subjects(model, packing, options, auto=loader, device=device)
    release(device)
    found = Report(
        model=name,
        dtype=str(model.dtype).removeprefix("torch."),
        config=dict(model.config.source),
        device=report.describe(device),
        settings={
            "what": list(dict.fromkeys(case.what for case in wanted)),
            "peers": options.peers,
            "repeats": options.repeats,
            "logits": options.logits,
            "load_in": options.load_in,
            "uncounted_decode_tokens": UNCOUNTED,
        },
        weights_bytes=subjects[0].weights_bytes,
        notes=notes,
    )
    with frozen():
        found.agreement = agreement(subjects, model.config.vocab_size, device)
        for case in wanted:
            points = measure(
                case,
                subjects,
                unit=KINDS[case.what].unit,
                vocab=model.config.vocab_size,
                device=device,
                repeats=options.repeats,
            )
            found.points += points
            progress(f"{case}: {', '.join(_brief(point) for point in points)}")
            if options.json is not None:
                found.write(options.json)
    if hasattr(model, "plan"):
        found.plan = [asdict(choice) for choice in model.plan().choices]
        if options.json is not None:
            found.write(options.json)
    return found


def _loader(options: Options, source: str) -> str:
    """The class that loads a folder, file or Hub id to be measured; a class without a head makes no text."""
    access = {"revision": options.revision, "local_files_only": options.local_files_only}
    kind = auto.AutoConfig.from_pretrained(source, **access).kind
    if kind not in ("decoder", "encoder"):
        raise RequestError(f"{source} is a model of the kind {kind!r}, which is not measured here")
    return "AutoModel" if kind == "encoder" else "AutoModelForCausalLM"


def _subjects(
    model: Any, packing: BitsAndBytesConfig | None, options: Options, *, auto: str, device: torch.device
) -> tuple[list[Any], list[str]]:
    """Taut and its peers on one model; with `packing` first in that format, then in the model's own dtype.
    Also what is to be said of them."""
    every = options.logits == "all"
    wanted, notes = peers.attentions(options.peers, dtype=model.dtype, device=device)
    source, common = model.config.source, {"auto": auto, "dtype": model.dtype, "device": device}
    subjects: list[Any] = []
    form = None
    if packing is not None:
        small = quantized(model, packing)
        subjects.append(Taut(small, name=f"taut {packing.format}", all_logits=every))
        if wanted:
            packed = packed_weights(small)
            if any(isinstance(m, Experts) for m in small.modules()):
                notes.append(
                    "transformers keeps experts in one tensor a layer, which bitsandbytes does not pack: the "
                    f"peer has the same values in {model.dtype}".replace("torch.", "")
                )
            state = shared_weights(small, without=packed)
            others, lacking = peers.make_peers(
                wanted, source, state, packed=packed, form=packing.format, all_logits=every, **common
            )
            subjects += others
        form = str(model.dtype).removeprefix("torch.")
    own = Taut(model, name="taut" if form is None else f"taut {form}", all_logits=every)
    subjects.append(own)
    if own.packed and wanted:
        notes.append("Taut computes with packed weights, the peers with the same values unpacked")
    state = shared_weights(model) if wanted else {}
    others, lacking = peers.make_peers(wanted, source, state, form=form, all_logits=every, **common)
    return subjects + others, notes + lacking


@torch.inference_mode()
def agreement(subjects: Sequence[Any], vocab: int, device: torch.device) -> dict[str, float]:
    """For each peer, the largest difference of its output from Taut's on 16 tokens, over the largest; a peer
    that fails has none, and says why when it is measured."""
    inputs = Inputs.of(Case("forward", 1, 16), vocab, device)
    own, found = None, {}
    for subject in subjects:
        try:
            scores = subject.forward(inputs)[0][:, -1].float()
        except Exception:  # every case will run into it again, and report it
            if own is None:
                return {}
            continue
        if own is None:
            own = scores
        else:
            found[subject.name] = float((scores - own).abs().max() / own.abs().max().clamp_min(1e-30))
    return found


def _cases(options: Options, generates: bool, device: torch.device) -> list[Case]:
    """The cases that the options ask for, with defaults that take minutes on a GPU or on a CPU."""
    gpu = device.type == "cuda"
    able = [name for name, kind in KINDS.items() if generates or not kind.generates]
    what = list(able) if options.what is None else cases.names("--what", options.what, list(KINDS))
    for kind in what:
        if kind not in able:
            raise RequestError(
                f"--what has {kind!r}, and {options.shape or options.model} is an encoder, which generates "
                f"no text; it has: {', '.join(able)}"
            )
    if options.new_tokens <= UNCOUNTED and any(KINDS[kind].generates for kind in what):
        raise RequestError(
            f"--new-tokens is {options.new_tokens}; expected more than {UNCOUNTED}: so many come before the "
            "clock starts"
        )
    spans = "512,2048,4096" if gpu else "128,512"
    if not generates:
        spans = "128,256,512"

    def listed(option: str, given: str | None, default: str) -> list[int]:
        return cases.integers(option, default if given is None else given)

    return cases.make_cases(
        what,
        lengths=listed("--lengths", options.lengths, spans),
        batches=listed("--batches", options.batches, "1,8" if gpu else "1,4"),
        contexts=listed("--contexts", options.contexts, "512,4096" if gpu else "128"),
        new_tokens=options.new_tokens,
    )


def _dtype(name: str) -> torch.dtype | None:
    """The dtype called `name`, None for auto."""
    if name == "auto":
        return None
    if name not in DTYPES:
        raise RequestError(f"--dtype is {name!r}; known: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _brief(point: Point) -> str:
    return f"{point.subject} {table.cell(point)}" + (f" {point.unit}" if point.median is not None else "")
