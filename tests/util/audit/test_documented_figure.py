"""The metric that CONTRIBUTING.md adds, as it stands there."""

import re

from tests.conftest import ROOT
from util.audit.statistics import value_of
from util.audit.subject import Scene, Subject


def test_the_documented_figure_measures_what_it_says(make_recognizer, make_images, cpu):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    (code,) = (block for block in blocks if "(Figure)" in block)
    names = {}
    exec(code, names)
    train, test = make_images(per_class=6), make_images(per_class=3, seed=1)
    subject = Subject(make_recognizer(), train, test, None, cpu)
    scene = Scene(train, test, (1, 4), (0, 2, 3, 5), None, subject, (), cpu)
    statistics = names["Nearest"]().measure(subject, scene).statistics
    assert [*statistics] == [*names["Nearest"].titles]
    unit = subject.train / subject.train.norm(dim=1, keepdim=True)
    nearest = [(unit @ subject.test[position]).argmax() for position in scene.forget_test]
    right = sum(train.labels[a] == test.labels[b] for a, b in zip(nearest, scene.forget_test, strict=True))
    assert value_of(statistics["nearest"], 2) == 100 * right / 6
