"""``minitrain sample``"""

from __future__ import annotations

import json
from pathlib import Path

import click

from minitrain.terminal import json_option


@click.command("sample", short_help="Let the model of a run go on with a text.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--prompt", default="", help="The text to go on with [default: none, the start of a sentence].")
@click.option(
    "--temperature",
    type=float,
    help="0 takes the likeliest token; 1 draws as the model predicts, below is safer, above wilder "
    "[default: 0, or 1 with --top-k or more than one text].",
)
@click.option("--top-k", type=int, help="Draw from the K likeliest tokens only.")
@click.option("--max-tokens", type=int, default=100, show_default=True, help="Stop there at the latest.")
@click.option("--num", type=click.IntRange(1), default=1, show_default=True, help="How many texts.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed draws the same texts.")
@json_option
def command(
    run: Path,
    prompt: str,
    temperature: float | None,
    top_k: int | None,
    max_tokens: int,
    num: int,
    seed: int,
    as_json: bool,
) -> None:
    """Let the model of RUN, a run folder or a file of its models/, go on with a text.

    \b
    minitrain sample runs/a --prompt "She has"
    minitrain sample runs/a --prompt "I" --num 5 --temperature 0.8 --top-k 10
    """
    from minitrain.sampling import Sampling, encode, generate, open_model

    if temperature is None:
        temperature = 0.0 if top_k is None and num == 1 else 1.0
    how = Sampling(temperature, top_k, max_tokens, seed)
    model, tokenizer, file = open_model(run)
    ids, unknown = encode(tokenizer, prompt)
    found = [generate(model, tokenizer, ids, how, number) for number in range(num)]
    texts = [tokenizer.decode(each.tokens) for each in found]
    if as_json:
        samples = [
            {"text": prompt + text, "continuation": text, "tokens": each.tokens, "finished": each.finished}
            for each, text in zip(found, texts, strict=True)
        ]
        answer = {"model": str(file), "prompt": prompt, "unknown": unknown, "temperature": temperature}
        click.echo(json.dumps(answer | {"top_k": top_k, "max_tokens": max_tokens, "seed": seed, "samples": samples}))
        return
    if unknown:
        click.echo(f"note: the model has never read {' '.join(map(repr, unknown))}; it sees <unk> there", err=True)
    if len(ids) > model.config.max_seq_len:
        click.echo(
            f"note: the prompt has {len(ids)} tokens with <bos>; the model sees the last {model.config.max_seq_len}",
            err=True,
        )
    for text in texts:
        click.echo(prompt + text)
