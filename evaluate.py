"""Evaluation as the paper did it (Sec. 4.1, App. C-G), on any Hugging Face LLaMA directory.

    python evaluate.py agieval MODEL --data agieval/ --out agieval.jsonl          the 8 English tasks, exact match (Table 5)
    python evaluate.py answers MODEL --bench mt --questions question.jsonl --out answers.jsonl        or alpaca, vicuna
    python evaluate.py judge answers.jsonl --mode single --questions question.jsonl --out requests.jsonl
    python evaluate.py judge batch_output.jsonl --requests requests.jsonl --out judgments.jsonl
    python evaluate.py report judgments.jsonl annotations.json ..                 win rates, scores, correlation of judges

Prompts and rules are the official tools', so that numbers can be set beside published ones; the judges are theirs too, or any
batch endpoint's: requests are written for it and its answers read, nothing here opens a connection. A run of `agieval` that was
killed goes on where it was; a prompt too long for the context loses its beginning, and is counted.
"""

from evaluation.agieval import AgievalConfig, agieval
from evaluation.answers import AnswersConfig, answers
from evaluation.judge import JudgeConfig, read_verdicts, write_requests
from evaluation.report import ReportConfig, report
from support.cli import parse_args, run


def main(argv):
    command, argv = (argv[0], argv[1:]) if argv else ("", [])
    if command == "agieval":
        agieval(parse_args(AgievalConfig, argv, positional="model"))
    elif command == "answers":
        answers(parse_args(AnswersConfig, argv, positional="model"))
    elif command == "judge":
        config = parse_args(JudgeConfig, argv, positional="files")
        (read_verdicts if config.requests else write_requests)(config)
    elif command == "report":
        report(parse_args(ReportConfig, argv, positional="files"))
    else:
        raise ValueError("say agieval, answers, judge or report; see the top of evaluate.py")


if __name__ == "__main__":
    run(main)
