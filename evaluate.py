"""Evaluation as the paper did it (Sec. 4.1, App. C-H), on any Hugging Face LLaMA directory.

    # the 8 English tasks of AGIEval, exact match (Table 5)
    python evaluate.py agieval MODEL --data agieval/ --out agieval.jsonl

    # answers to a benchmark's questions, requests to a judge, its verdicts, the tables (Table 1)
    python evaluate.py answers MODEL --bench mt --questions question.jsonl --name openchat
    python evaluate.py judge openchat.jsonl --mode single --questions question.jsonl \\
        --out requests.jsonl
    python evaluate.py judge batch_output.jsonl --requests requests.jsonl --out judgments.jsonl
    python evaluate.py report judgments.jsonl annotations.json ..

Each command is a file of evaluation/, where what it does is explained. Prompts and rules are the
official tools', so that numbers can be set beside published ones. The judges are theirs too, or
any batch endpoint's: requests are written for it and its answers are read; nothing here opens a
connection. A run of `agieval` that was killed goes on where it was. A prompt that is too long for
the context loses its beginning, and is counted.
"""

import support.threads  # noqa: F401, first: how threads wait is said before torch is loaded
from evaluation.agieval import AgievalConfig, agieval
from evaluation.answers import AnswersConfig, answers
from evaluation.judge import JudgeConfig, read_verdicts, write_requests
from evaluation.report import ReportConfig, report
from support.cli import check_help, parse_args, run


def main(argv: list[str]) -> None:
    """The first word is the command, the others are its own."""
    check_help(argv)
    command = argv[0] if argv else ""
    words = argv[1:]
    if command == "agieval":
        agieval(parse_args(AgievalConfig, words, positional="model"))
    elif command == "answers":
        answers(parse_args(AnswersConfig, words, positional="model"))
    elif command == "judge":
        config = parse_args(JudgeConfig, words, positional="files")
        if config.requests:
            read_verdicts(config)
        else:
            write_requests(config)
    elif command == "report":
        report(parse_args(ReportConfig, words, positional="files"))
    else:
        raise ValueError("say agieval, answers, judge or report; see the top of evaluate.py")


if __name__ == "__main__":
    run(main)
