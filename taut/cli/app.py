"""The commands and their options; each body imports what it needs, so that `taut --help` needs little."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from taut.errors import RequestError, TautError

app = typer.Typer(
    name="taut",
    help="Run Hugging Face transformer checkpoints: safetensors, GGUF or a Hub id, as they are.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda or cuda:N.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")]
Local = Annotated[bool, typer.Option("--local-files-only", help="Use what is on disk; ask no network.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Seed = Annotated[int, typer.Option(help="Seed of the sampling; the same seed gives the same text.")]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(help="Stop after this many tokens. Unset: 512 (chat: 1024), or what the context leaves."),
]
Temperature = Annotated[
    float | None, typer.Option(help="0: always the likeliest token. Unset: what the model's files say.")
]
TopP = Annotated[float | None, typer.Option(help="Sample from the likeliest tokens that hold this much.")]
TopK = Annotated[int | None, typer.Option(help="Sample from this many of the likeliest tokens; 0: all.")]
MinP = Annotated[float | None, typer.Option(help="Drop tokens below this share of the likeliest one's.")]
Penalty = Annotated[
    float | None, typer.Option("--repetition-penalty", help="> 1: tokens seen before become less likely.")
]
Stop = Annotated[list[str] | None, typer.Option(help="Stop at this text; may be given several times.")]
System = Annotated[str | None, typer.Option(help="System message of the chat template.")]
LoadIn = Annotated[
    str | None, typer.Option(help="Pack the linear layers while loading: 4bit (nf4), 8bit, nf4, fp4, int8.")
]
Model = Annotated[
    str | None,
    typer.Argument(help="Folder, .gguf file or Hub id. Default: SmolLM2-135M-Instruct.", show_default=False),
]


@contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Turns an error into one line on stderr and an exit code: 1, or 130 after Ctrl-C. A warning is one
    line too."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: typer.echo(f"warning: {message}", err=True)
            yield
    except (BrokenPipeError, typer.Exit):
        raise
    except KeyboardInterrupt:
        if debug:
            raise
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from None
    except (TautError, OSError, MemoryError) as error:
        if debug:
            raise
        typer.echo(f"error: {error or type(error).__name__}", err=True)
        raise typer.Exit(1) from None
    except RuntimeError as error:
        if debug or "out of memory" not in str(error):
            raise
        typer.echo(f"error: {error}; try --device cpu, fewer --max-new-tokens or a smaller model", err=True)
        raise typer.Exit(1) from None


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"taut {version('taut')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


def _prompt(model: str | None, prompt: str | None) -> tuple[str | None, str]:
    """The model and the prompt out of `[MODEL] PROMPT`: a single argument is the prompt, `-` or none at
    all is standard input."""
    if prompt is None:
        model, prompt = None, model
        if prompt is not None and (prompt.endswith(".gguf") or Path(prompt, "config.json").is_file()):
            raise RequestError(
                f"{prompt!r} is a model, and there is no prompt: give it after the model, or - to read "
                f"standard input (taut generate {prompt} -)"
            )
    if prompt is None and sys.stdin.isatty():
        raise RequestError('there is no prompt: give one (taut generate "...") or pipe it in')
    if prompt is None or prompt == "-":
        try:
            prompt = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise RequestError(f"the prompt on standard input is not text: {error}") from None
        # The newline that echo and editors end with is not part of the prompt.
        prompt = prompt.removesuffix("\n")
    if not prompt.strip():
        raise RequestError('the prompt is empty: give some text (taut generate "Why is the sky blue?")')
    return model, prompt


@app.command()
def generate(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Folder, .gguf file or Hub id. Default: SmolLM2-135M-Instruct.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="The text; - or nothing: standard input.", show_default=False),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is: no chat template.")] = False,
    system: System = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    stop: Stop = None,
    json_schema: Annotated[
        Path | None, typer.Option(help="The answer is JSON of the schema in this file.", show_default=False)
    ] = None,
    regex: Annotated[
        str | None, typer.Option(help="The answer matches this regular expression.", show_default=False)
    ] = None,
    grammar: Annotated[
        Path | None,
        typer.Option(help="The answer follows the Lark grammar in this file.", show_default=False),
    ] = None,
    seed: Seed = 0,
    load_in: LoadIn = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    local_files_only: Local = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer a prompt, or continue it (--raw); the text streams to standard output, facts to standard error.

    The model's chat template is applied when it has one.
    """
    with reported(debug):
        model, prompt = _prompt(model, prompt)
        from taut.cli import generate as command
        from taut.cli.session import Options

        shape = command.response_format(json_schema, regex, grammar)
        command.run(
            model, prompt, Options.of(context.params), raw=raw, system=system, as_json=json, shape=shape
        )


@app.command()
def chat(
    context: typer.Context,
    model: Model = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    stop: Stop = None,
    seed: Seed = 0,
    load_in: LoadIn = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    local_files_only: Local = False,
    debug: Debug = False,
) -> None:
    """Talk with a model. /help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves."""
    with reported(debug):
        from taut.cli import chat as command
        from taut.cli.session import Options

        command.run(model, Options.of(context.params), system=system)


@app.command()
def run(
    task: Annotated[
        str, typer.Argument(help="text-classification, ner, summarization ...; an unknown one lists all.")
    ],
    model: Annotated[str, typer.Argument(help="Folder, .gguf file or Hub id.")],
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Texts, questions, or paths of images or sounds; - reads lines of standard input.",
        ),
    ],
    context: Annotated[
        str | None, typer.Option(help="The text that holds the answers (question-answering).")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Labels to choose from, separated by commas (zero-shot).")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of the task; may be given several times."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Inputs computed together. Default: what the device likes.")
    ] = None,
    load_in: LoadIn = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    local_files_only: Local = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object a line, one for each input.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Run a task over inputs: classify, extract, fill, answer, summarize, translate, transcribe ...

    An input that can't be used is an error on standard error, and the others go on.
    """
    with reported(debug):
        from taut.cli import run as command

        fine = command.run(
            task,
            model,
            inputs,
            context=context,
            labels=labels,
            settings=settings or (),
            batch_size=batch_size,
            as_json=json,
            load_in=load_in,
            dtype=dtype,
            device=device,
            revision=revision,
            local_files_only=local_files_only,
        )
        if not fine:
            raise typer.Exit(1)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a 16-bit model.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="New folder for the result.", show_default=False)],
    form: Annotated[str, typer.Option("--format", help="nf4, fp4 or int8.")] = "nf4",
    double_quant: Annotated[
        bool, typer.Option("--double-quant", help="4 bit: keep the scales in 8 bits too.")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    local_files_only: Local = False,
    debug: Debug = False,
) -> None:
    """Write a model's linear layers in 4 or 8 bit, as bitsandbytes stores them."""
    with reported(debug):
        from taut.cli import quantize as command

        options = {"dtype": dtype, "device": device, "revision": revision}
        command.run(
            model, out, form=form, double_quant=double_quant, local_files_only=local_files_only, **options
        )


@app.command(name="eval")
def evaluate(
    context: typer.Context,
    model: Model = None,
    against: Annotated[
        str | None, typer.Option(help="Another model, to measure the distance from its predictions.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text to predict. Default: a few short built-in ones.", exists=True)
    ] = None,
    load_in: LoadIn = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    local_files_only: Local = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Perplexity of a model, and KL divergence and top-1 agreement against another."""
    with reported(debug):
        from taut.cli import evaluate as command
        from taut.cli.session import Options

        options = Options.of(context.params)
        command.run(model, options, against=against, text=text, as_json=json)


@app.command()
def inspect(
    model: Model = None,
    dtype: Annotated[str, typer.Option(help="Count memory in this dtype, not the checkpoint's.")] = "auto",
    revision: Revision = None,
    local_files_only: Local = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what a model is and what memory it takes, without loading its weights."""
    with reported(debug):
        from taut.cli import inspect as command

        command.run(model, dtype=dtype, revision=revision, local_files_only=local_files_only, as_json=json)


@app.command()
def bench(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="Folder, .gguf file or Hub id. Default: SmolLM2-135M-Instruct.")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Random weights in a known shape: llama-7b, falcon-7b, mistral-7b, llama-8b, bert-base, "
            "mixtral-8x7b, qwen3-30b-a3b, gpt-oss-20b."
        ),
    ] = None,
    what: Annotated[
        str | None, typer.Option(help="Some of forward,padded,generate,decode,memory. Default: all.")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Sequence lengths. Default: 512,2048,4096; on a CPU 128,512.")
    ] = None,
    batches: Annotated[str | None, typer.Option(help="Rows. Default: 1,8; on a CPU 1,4.")] = None,
    contexts: Annotated[
        str | None, typer.Option(help="Prompt lengths of decode. Default: 512,4096; on a CPU 128.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens that generate and decode make.")] = 64,
    logits: Annotated[
        str, typer.Option(help="Score the last position of each row of a forward, or all.")
    ] = "last",
    dtype: Dtype = "auto",
    device: Device = "auto",
    peers: Annotated[
        str, typer.Option(help="none, sdpa, transformers (eager, sdpa), or all (and flash-attn).")
    ] = "transformers",
    load_in: Annotated[
        str | None,
        typer.Option(
            help="Taut in 4bit (nf4), 8bit, nf4, fp4 or int8, beside bitsandbytes' own and beside 16 bit."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Counted runs of each case.")] = 5,
    json: Annotated[
        Path | None, typer.Option(help="Write everything here: device, versions, date, all samples.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw PNG charts into this folder.")] = None,
    saved: Annotated[
        Path | None,
        typer.Option("--from", help="Measure nothing: show, and draw, what --json wrote into this file."),
    ] = None,
    revision: Revision = None,
    local_files_only: Local = False,
    debug: Debug = False,
) -> None:
    """Measure a model beside transformers: forward, padded batches, generate, decode and memory.

    All run in this process, in turns, with the same weights. Lists are separated by commas.
    """
    with reported(debug):
        from taut.bench.run import Options, run

        given = {name: value for name, value in context.params.items() if name != "debug"}
        # The context holds what was typed; some releases of typer make paths only for the arguments.
        if not run(Options(**{**given, "json": json, "plot": plot, "saved": saved})):
            raise typer.Exit(1)
