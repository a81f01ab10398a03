"""Bad Teacher: a competent and an incompetent teacher (Chundawat et al., AAAI 2023, arXiv 2205.08096)."""

from torch import nn

from backbone.recognizer import build_recognizer, to_device
from methods.base import Option
from methods.distillation import Distillation, Teacher, kl_divergence


class BadTeacher(Distillation):
    """L = λ · KL_T(random ‖ h_f) + KL_T(teacher ‖ h_r)

    The random teacher is an untrained backbone of the same architecture and, as the paper's, an untrained linear layer: its
    softmax is near uniform. A margin head's is not, whose cosines are multiplied by 64.
    """

    name = "bad_teacher"
    title = "Bad Teacher"
    options = [
        *Distillation.options,
        Option("lr", 1e-3),
        Option("temperature", 1.0, "temperature T of the distillations", low=0.01),
        Option("lambda", 0.3, "weight λ of the incompetent teacher"),
    ]

    def prepare(self, model):
        super().prepare(model)
        untrained = build_recognizer(model.architecture)
        untrained.head = nn.Linear(untrained.backbone.num_features, model.architecture.num_classes)
        self.incompetent = Teacher(
            to_device(untrained, self.hardware), self.train_set, self.task.forget_indices, self.hardware
        )

    def loss(self, model, batch):
        logits, indices = batch.split(model(batch.images)), batch.split(batch.indices)
        teachers = {"forget": self.incompetent, "remain": self.teacher}
        parts = {
            stream: kl_divergence(teacher.logits(indices[stream]), logits[stream], self.args.temperature)
            for stream, teacher in teachers.items()
        }
        return {"total": self.args.lambda_ * parts["forget"] + parts["remain"], **parts}
