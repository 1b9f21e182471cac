"""One module a class of defect, each a pure function of texts; stages/quality.py decides.

mojibake, noise and language look at one text, boilerplate and near_duplicates at all of them;
personal data and secrets are found by resources/recognisers. scan runs what can be remembered by a
text's hash. benchmarks/defects.py plants each defect into installed packages' prose and prints
precision and recall.
"""
