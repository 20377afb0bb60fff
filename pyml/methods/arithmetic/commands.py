"""The options of ``pyml train arithmetic`` and ``pyml predict arithmetic``."""

from typing import Annotated

from pyml.methods import _head_options as common
from pyml.methods import _options as shared
from pyml.methods._options import TRAIN, option


def train(
    model: common.Model = None,
    data: common.Data = None,
    control: common.Control = None,
    transfer: common.Transfer = None,
    train_share: common.TrainShare = 0.6,
    dtype: common.Dtype = "float32",
    tiny_steps: common.TinySteps = None,
    arms: Annotated[
        str,
        option(
            "base, precise, random, lora, full, the last four also as NAME-early; several with commas, or all.",
            TRAIN,
        ),
    ] = "all",
    seeds: shared.Seeds = 3,
    first_seed: shared.FirstSeed = 0,
    epochs: common.Epochs = None,
    batch_size: common.BatchSize = 32,
    learning_rate: Annotated[
        float | None, option("AdamW's rate for heads and LoRA. Default: 3e-3 without --model, else 2e-5.", TRAIN)
    ] = None,
    full_rate: Annotated[
        float | None, option("Its rate where all numbers are trained. Default: 3e-4, else 1e-5.", TRAIN)
    ] = None,
    weight_decay: common.WeightDecay = 0.0,
    stop_loss: common.StopLoss = 0.02,
    heads: common.HeadCount = 0,
    mlps: common.MlpCount = 0,
    projections: Annotated[
        str, option("Of the heads, what is trained: q, k, v, o with commas.", common.HEADS)
    ] = "q,k,v,o",
    scale_gradients: Annotated[
        bool,
        option("Scale gradients of tuned heads by the heads of their layer over its tuned ones.", common.HEADS),
    ] = True,
    keep_prefix: common.KeepPrefix = False,
    score_lines: common.ScoreLines = 256,
    difference: common.Difference = "relative",
    ablation: Annotated[str, option("Knockouts: zero, or mean (of the head's output).", common.HEADS)] = "mean",
    out: shared.Out = None,
    resume: shared.Resume = False,
    device: shared.Device = "auto",
    threads: shared.Threads = None,
    quiet: shared.QuietRun = False,
) -> None:
    """Find the heads that compute an answer by path patching and train only their slices (arXiv 2409.01659).

    Without --model, tiny Llamas that are weak at differences are used; they are trained first (about a minute, once).
    """
    given = dict(locals())
    from pyml.methods.arithmetic import train as parts

    common.run_training("arithmetic", train, given, parts)


def predict(
    checkpoint: common.Checkpoint,
    input: common.Prompts,
    out: common.Answers,
    model: common.Moved = None,
    max_tokens: common.Length = 64,
    device: shared.Device = "auto",
    threads: shared.Threads = None,
    quiet: shared.Quiet = False,
) -> None:
    """Answer prompts with the model of a trained arm, by greedy decoding."""
    from pyml.methods._head_data import same_language
    from pyml.methods.arithmetic.data import MIXTURE

    shared.set_threads(threads)
    common.predict_lines(
        "arithmetic", same_language(MIXTURE, model, shown=not quiet), checkpoint, input, out, most=max_tokens,
        device=device, quiet=quiet,
    )  # fmt: skip
