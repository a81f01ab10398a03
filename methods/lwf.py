"""LwF: learning without forgetting (Li & Hoiem, ECCV 2016, arXiv 1606.09282)."""

from methods.base import Option
from methods.distillation import RelabelAndMatch, kl_divergence


class LwF(RelabelAndMatch):
    """L = CE(z_f, ỹ) + λ_r · CE(z_r, y_r) + λ_kd · KL_T(teacher(x_r) ‖ student(x_r))

    The teacher is θ₀, by default the model that enters the task; distilled are the label-free logits.
    """

    name = "lwf"
    title = "LwF"
    options = [
        *RelabelAndMatch.options,
        Option("lr", 1e-3, published=1e-4),
        Option("lambda_remain", 2.0, "weight λ_r of the replay", published=10.0),
        # The published distillation takes the logarithm of a log-softmax, which is NaN, and sets NaN to 0.
        Option("lambda_kd", 0.5, "weight λ_kd of the distillation", published=0.0),
        Option("temperature", 2.0, "temperature T of the distillation", low=0.01),
    ]

    def loss(self, model, batch):
        logits, labels = batch.split(model(batch.images)), batch.split(batch.labels)
        indices = batch.split(batch.indices)["remain"]
        forget = self.forget_loss(model, logits["forget"], labels["forget"])
        remain = model.head.loss_of_logits(logits["remain"], labels["remain"])
        distillation = kl_divergence(self.teacher.logits(indices), logits["remain"], self.args.temperature)
        total = forget + self.args.lambda_remain * remain + self.args.lambda_kd * distillation
        return {"total": total, "forget": forget, "remain": remain, "distillation": distillation}
