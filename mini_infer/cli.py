"""The ``mini-infer`` command: generate, chat, download-demo, info, bench."""

from __future__ import annotations

import argparse
import io
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mini_infer import __version__
from mini_infer.bench.arguments import add_arguments
from mini_infer.config import DEVICES, DTYPES, LOAD_FORMATS, PREEMPTION_MODES, EngineConfig
from mini_infer.demo_model import demo_model_available, demo_model_path, download_demo_model
from mini_infer.exceptions import ConfigError, InvalidRequestError, MiniInferError
from mini_infer.outputs import GenerateOutput, StreamIncrement
from mini_infer.sampling import SamplingParams

CLI_MAX_NUM_SEQS = 16
CLI_MAX_TOKENS = 256
EXIT_OK, EXIT_ERROR, EXIT_INTERRUPTED, EXIT_PIPE_CLOSED = 0, 1, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0; 1 for an error that was explained; 130 for an interrupt; 141 where nobody reads what is
        printed any more.
    """
    # Before torch is imported: threads that spin for long crawl on a busy machine, and waking one that sleeps is slow,
    # so they spin for some tens of microseconds, then sleep.
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    arguments = _parser().parse_args(argv)
    logging.basicConfig(
        level=logging.INFO if arguments.verbose else logging.WARNING, format="%(levelname)s: %(message)s"
    )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack characters that a model has
    run: Callable[[argparse.Namespace], None] = arguments.run
    try:
        run(arguments)
    except MiniInferError as error:
        print(f"mini-infer: {type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is written when Python ends
        return EXIT_PIPE_CLOSED
    return EXIT_OK


def _generate(arguments: argparse.Namespace) -> None:
    if arguments.raw and arguments.system:
        raise ConfigError("--system is part of the chat template, which --raw leaves out: give one of them")
    params = _sampling(arguments)
    with _engine(arguments) as engine:
        if arguments.raw or not engine.has_chat_template:
            increments = engine.stream(arguments.prompt, sampling_params=params)
        else:
            increments = engine.stream_chat(_messages(arguments, arguments.prompt), sampling_params=params)
        output = _print_stream(increments)
        print(f"\n[{_figures(output, engine.stats())}]")


def _chat(arguments: argparse.Namespace) -> None:
    params = _sampling(arguments)
    with _engine(arguments) as engine:
        print("Type a message; an empty line or Ctrl-D ends the conversation, Ctrl-C an answer.")
        messages = _messages(arguments)
        while (text := _read_line()) is not None:
            turn = [*messages, {"role": "user", "content": text}]
            try:
                output = _print_stream(engine.stream_chat(turn, sampling_params=params))
            except InvalidRequestError as error:  # the conversation has become too long, say
                print(f"mini-infer: {error} (this message is left out)", file=sys.stderr)
                continue
            except KeyboardInterrupt:
                print("\n[interrupted: this message is left out]")
                continue
            print(f"\n[{_figures(output, engine.stats())}]")
            messages = [*turn, {"role": "assistant", "content": output.text}]


def _download_demo(arguments: argparse.Namespace) -> None:
    if demo_model_available() and not arguments.force:
        print(f"the demo model is there: {demo_model_path()}")
        return
    print(f"the demo model is in {download_demo_model(force=arguments.force)}")


def _info(arguments: argparse.Namespace) -> None:
    import torch
    import transformers

    from mini_infer.device_memory import estimate_plan

    print(f"mini_infer    {__version__}")
    print(f"python        {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(f"torch         {torch.__version__}")
    print(f"triton        {_triton_version()}")
    print(f"transformers  {transformers.__version__}")
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        print(f"device        {torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
    else:
        print(f"device        CPU, {torch.get_num_threads()} threads (PyTorch sees no GPU)")
    if arguments.model is None and not demo_model_available():
        print("\nno model given, and the demo model is not downloaded: `mini-infer download-demo` fetches it")
        return
    spec, plan = estimate_plan(_config(arguments))
    print(f"\nmodel         {arguments.model or demo_model_path()}")
    print(
        f"              {spec.architecture}, {spec.num_parameters() / 1e6:,.0f} M parameters, "
        f"{spec.num_layers} layers, {spec.num_heads}/{spec.num_kv_heads} heads of {spec.head_dim}, "
        f"vocabulary {spec.vocab_size:,}, at most {spec.max_position_embeddings:,} tokens"
    )
    print(f"\nmemory plan (estimated, nothing is loaded)\n{plan.describe()}")


def _bench(arguments: argparse.Namespace) -> None:
    from mini_infer.bench.command import run  # imports torch

    run(arguments)


def _engine(arguments: argparse.Namespace) -> Any:
    from mini_infer.engine import LLMEngine  # after the arguments are known to be right: it imports torch

    return LLMEngine(_config(arguments))


def _config(arguments: argparse.Namespace) -> EngineConfig:
    model = arguments.model
    if model is None:
        model = str(demo_model_path() if demo_model_available() else download_demo_model())
    options = {name: getattr(arguments, name) for name in _ENGINE_OPTIONS if getattr(arguments, name) is not None}
    return EngineConfig(model=model, **options)


def _sampling(arguments: argparse.Namespace) -> SamplingParams:
    return SamplingParams(
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        presence_penalty=arguments.presence_penalty,
        frequency_penalty=arguments.frequency_penalty,
        seed=arguments.seed,
        max_tokens=arguments.max_tokens,
        stop=arguments.stop or (),
    )


def _messages(arguments: argparse.Namespace, prompt: str | None = None) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": arguments.system}] if arguments.system else []
    return messages if prompt is None else [*messages, {"role": "user", "content": prompt}]


def _print_stream(increments: Iterator[StreamIncrement]) -> GenerateOutput:
    """Print text as it comes; returns the whole output."""
    for increment in increments:
        print(increment.text, end="", flush=True)
        if increment.output is not None:
            if increment.output.error is not None:
                raise MiniInferError(f"the request failed: {increment.output.error}")
            return increment.output
    raise AssertionError("a stream ends with its output")


def _figures(output: GenerateOutput, stats: Any) -> str:
    """One line: tokens, time to first token, decode rate, padding."""
    timings = output.timings
    decode_s = timings.latency - (timings.ttft or 0.0)
    rate = (len(output.token_ids) - 1) / decode_s if decode_s > 0 and len(output.token_ids) > 1 else 0.0
    return (
        f"{len(output.prompt_token_ids)} prompt tokens ({output.num_cached_tokens} cached), "
        f"{len(output.token_ids)} output tokens ({output.finish_reason}), TTFT {(timings.ttft or 0.0) * 1e3:.0f} ms, "
        f"{rate:.1f} tok/s, padding: prefill {stats.prefill_padding:.0%}, decode {stats.decode_padding:.0%}"
    )


def _read_line() -> str | None:
    """The user's next message; None at the end of the conversation."""
    try:
        return input("> ").strip() or None
    except EOFError:
        return None


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "not installed (needed on a GPU only)"
    return str(triton.__version__)


_ENGINE_OPTIONS = (
    "tokenizer",
    "max_num_seqs",
    "max_model_len",
    "block_size",
    "gpu_memory_utilization",
    "dtype",
    "device",
    "load_format",
    "num_gpu_blocks",
    "preemption",
    "max_prefill_tokens",
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mini-infer", description="A static LLM inference engine.")
    parser.add_argument("--version", action="version", version=f"mini-infer {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="answer one prompt, streamed", formatter_class=_Help)
    generate.add_argument("prompt", help="what to answer (through the model's chat template, if it has one)")
    generate.add_argument("--raw", action="store_true", help="continue the prompt as it is, without the chat template")
    generate.set_defaults(run=_generate)

    chat = commands.add_parser("chat", help="a conversation in the terminal", formatter_class=_Help)
    chat.set_defaults(run=_chat)

    download = commands.add_parser("download-demo", help="fetch the demo model SmolLM2-135M-Instruct (about 100 MB)")
    download.add_argument("--force", action="store_true", help="fetch and convert it again")
    download.set_defaults(run=_download_demo)

    info = commands.add_parser("info", help="device, versions, and a model's memory plan", formatter_class=_Help)
    info.set_defaults(run=_info)

    bench = commands.add_parser("bench", help="benchmarks with random weights of a real shape", formatter_class=_Help)
    add_arguments(bench)
    bench.set_defaults(run=_bench)

    for command in (generate, chat, info):
        _add_engine_options(command)
    for command in (generate, chat):
        _add_sampling_options(command)
    for command in (generate, chat, download, info, bench):
        command.add_argument("--verbose", action="store_true", help="log the start and the memory plan")
    return parser


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except where there is none to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_shown = action.default is not None and action.default is not False
        return super()._get_help_string(action) if is_shown else action.help


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument("--model", help="Hugging Face name or local folder; without it the demo model is used")
    group.add_argument("--tokenizer", help="name or folder of the tokenizer, if it is not the model's")
    group.add_argument("--device", choices=DEVICES, help="where to run; by default the GPU if there is one")
    group.add_argument("--dtype", choices=DTYPES, help="type of weights and KV cache (a CPU computes in float32)")
    group.add_argument("--max-num-seqs", type=int, default=CLI_MAX_NUM_SEQS, help="most sequences at once")
    group.add_argument("--max-model-len", type=int, help="most tokens of one sequence")
    group.add_argument("--block-size", type=int, help="tokens per KV cache block")
    group.add_argument("--gpu-memory-utilization", type=float, help="share of the device's memory to use")
    group.add_argument("--num-gpu-blocks", type=int, help="KV cache blocks, instead of what the memory leaves")
    group.add_argument("--max-prefill-tokens", type=int, help="most prompt tokens of one step")
    group.add_argument("--preemption", choices=PREEMPTION_MODES, help="what to do with sequences that lose their place")
    group.add_argument("--load-format", choices=LOAD_FORMATS, help="dummy: random weights of the model's shape")


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--system", help="system message of the conversation")
    group.add_argument("--max-tokens", type=int, default=CLI_MAX_TOKENS, help="most tokens to generate")
    group.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    group.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling threshold")
    group.add_argument("--top-k", type=int, default=-1, help="keep the most likely tokens only; -1 keeps all")
    group.add_argument("--min-p", type=float, default=0.0, help="drop tokens less likely than this times the likeliest")
    group.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 discourages tokens seen before")
    group.add_argument("--presence-penalty", type=float, default=0.0, help="taken from tokens generated before")
    group.add_argument("--frequency-penalty", type=float, default=0.0, help="the same for each time they were")
    group.add_argument("--seed", type=int, help="seed of the draws")
    group.add_argument("--stop", action="append", help="string that ends the text (may be given more than once)")
