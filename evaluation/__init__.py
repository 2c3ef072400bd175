"""Evaluation as the paper did it: a file for each command of evaluate.py, and what they share.

agieval.py   multiple choice: a letter is right or wrong, no judge is needed (Table 5)
answers.py   answers to open questions, for a judge to read (AlpacaEval, MT-bench, Vicuna-bench)
judge.py     the questions to the judge, and what it said
report.py    win rates, scores, and whether two judges agree (Table 1, Fig. 2, 3, 8, 9)
rows.py      the files of all four: rows in, rows out, tables
"""
