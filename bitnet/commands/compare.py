"""Every quantization method on one model: quality, size and speed in one table and a few pictures.

    bitnet compare runs/demo                      the run, its twins, every method on the float one
    bitnet compare runs/demo --train none binary  trains these twins first, where they are missing
    bitnet compare runs/demo runs/a runs/b        these runs and, of other quantizers, the first one's twins
    bitnet compare model.gguf --text sotu         any float model that generate.py takes

The float model is the reference: post-training methods start from its weights, and KL divergence and top-1 agreement
are taken against its predictions, token by token on the same held-out text. A twin (a run that differs from another
in its weight quantizer and learning rates only) was trained on its own, so its agreement says how alike two trainings
are, not how good the quantizer is; perplexity compares everything.

Every model is written to disk, and its speed and memory are measured in a process of its own that loads that file. What
`kernel` says matters: `native` reads the weights as they are stored, behind INT8 or float activations; `int8`
multiplies integers layer by layer in torch; `dequantizes` unpacks to floats first and has a float product's speed,
whatever its file size.

Embedding and head are FP16 in the files of weight-only methods, INT8 where activations are INT8 too, and what the
mixture says in GGUF mixtures.

    perplexity = exp(mean -ln p(token))      its standard error is perplexity times that of the mean over windows
    gap = mean ln(p_float(token) / p(token)), nats a token, +- its own standard error, from the windows one by one
    stored, whole: bits of a projection's weight with its scales; bits of all that is stored, embedding and head too,
    for each parameter of the float model      what each column is: `bitnet/evaluation/table.py`
    KL = mean sum_v p_float(v) ln(p_float(v) / p(v)), nats a token      top-1: share of tokens with the same arg max
    cloze, grammar, definitions: accuracy on tasks of our own, no public benchmark's (`bitnet/evaluation/tasks.py`)
"""

import sys

from bitnet.console import only_for_looking
from bitnet.evaluation.options import Options

TRAIN = (sys.executable, "-m", "bitnet", "train")


def run(options: Options) -> None:
    """Print the table and write the folder; an interrupted call goes on when it is made again."""
    from bitnet.evaluation.comparison import Comparison
    from bitnet.evaluation.table import LEGEND, terminal
    from bitnet.machine import use_threads
    from bitnet.pages.report import write_report

    comparison = Comparison(options, train=TRAIN)
    use_threads(options.threads)
    try:
        comparison.run()
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on, {options.out} has the rows so far", file=sys.stderr)
        raise
    print(terminal(list(comparison.rows.values())))
    print(f"{LEGEND} In {options.out}: the table, pictures, and report.html.")
    comparison.draw()
    with only_for_looking("the page of the comparison"):
        write_report(options.out / "report.html", comparison.so_far())
