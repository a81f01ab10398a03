"""Bad Teacher: a competent teacher for what remains, an incompetent one for the rest (Chundawat et al., AAAI 2023)."""

from torch import Tensor

from backbone.recognizer import Recognizer, build_recognizer, to_device
from data.batches import Batch
from data.image_set import ImageSet
from data.tasks import ForgettingTask
from methods.base import Option
from methods.distillation import Distillation, Teacher, kl_divergence


class BadTeacher(Distillation):
    """L = λ · KL_T(random ‖ h_f) + KL_T(teacher ‖ h_r), the random teacher an untrained model of the same architecture."""

    name = "bad_teacher"
    title = "Bad Teacher"
    source = "arXiv 2205.08096"
    options = [
        *Distillation.options,
        Option("lr", 1e-3),
        Option("temperature", 1.0, "temperature T of the distillations", low=0.01),
        Option("lambda", 0.3, "weight λ of the incompetent teacher"),
    ]

    def begin_task(self, model: Recognizer, task: ForgettingTask, train_set: ImageSet, epochs: int) -> None:
        super().begin_task(model, task, train_set, epochs)
        self.competent = Teacher(self.teacher_of(model), train_set, task.remain_indices, self.hardware)
        untrained = to_device(build_recognizer(model.architecture), self.hardware)
        self.incompetent = Teacher(untrained, train_set, task.forget_indices, self.hardware)

    def loss(self, model: Recognizer, batch: Batch) -> dict[str, Tensor]:
        logits, indices = batch.split(model(batch.images)), batch.split(batch.indices)
        teachers = {"forget": self.incompetent, "remain": self.competent}
        parts = {
            stream: kl_divergence(teacher.logits(indices[stream]), logits[stream], self.args.temperature)
            for stream, teacher in teachers.items()
        }
        return {"total": self.args.lambda_ * parts["forget"] + parts["remain"], **parts}
