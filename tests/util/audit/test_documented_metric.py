"""The metric that CONTRIBUTING.md adds, as it stands there."""

import re

from tests.conftest import ROOT
from util.audit.inputs import AuditedModel, AuditTask
from util.audit.statistics import value_of


def test_the_documented_figure_measures_what_it_says(make_recognizer, make_images, cpu):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    (code,) = (block for block in blocks if "(AuditMetric)" in block)
    names = {}
    exec(code, names)
    train, test = make_images(per_class=6), make_images(per_class=3, seed=1)
    audited = AuditedModel(make_recognizer(), train, test, None, cpu)
    task = AuditTask(train, test, (1, 4), (0, 2, 3, 5), None, audited, (), cpu)
    statistics = names["Nearest"]().measure(audited, task).statistics
    assert [*statistics] == [*names["Nearest"].titles]
    unit = audited.train_embeddings / audited.train_embeddings.norm(dim=1, keepdim=True)
    nearest = [(unit @ audited.test_embeddings[position]).argmax() for position in task.forget_test]
    right = sum(train.labels[a] == test.labels[b] for a, b in zip(nearest, task.forget_test, strict=True))
    assert value_of(statistics["nearest"], 2) == 100 * right / 6
