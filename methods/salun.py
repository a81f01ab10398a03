"""SalUn: saliency unlearning (Fan et al., ICLR 2024, arXiv 2310.12508)."""

import torch

from methods.base import Method, Option, TaskOutput
from methods.importance import mean_importance
from methods.relabel import draw_labels


class SalUn(Method):
    """L = CE(z_f, ỹ) + λ · CE(z_r, y_r), of the weights alone in which |∂CE(z_f, y_f)/∂θ_i| is among the largest.

    The others keep their values: no gradient reaches them, and no weight decay.
    """

    name = "salun"
    title = "SalUn"
    options = [
        Option("lr", 3e-4),
        Option("weight_decay", 0.0),
        Option("saliency", 0.5, "share of the weights that are trained", low=1e-6, high=1),
        Option("lambda", 2.0, "weight λ of the replay"),
    ]

    def prepare(self, model):
        data = self.train_set, self.task.forget_indices, self.hardware, self.args.batch_size
        gradients = mean_importance(model, model.head.loss_of_logits, torch.clone, *data)
        sizes = torch.cat([gradient.abs().flatten() for gradient in gradients.values()])
        least = sizes.sort(descending=True).values[max(0, round(self.args.saliency * len(sizes)) - 1)]
        self.hooks = []
        for name, gradient in gradients.items():
            salient = gradient.abs() >= least
            self.hooks.append(model.get_parameter(name).register_hook(lambda g, salient=salient: g * salient))

    def loss(self, model, batch):
        logits, labels = batch.split(model(batch.images)), batch.split(batch.labels)
        forget = model.head.loss_of_logits(logits["forget"], draw_labels(self, labels["forget"]))
        remain = model.head.loss_of_logits(logits["remain"], labels["remain"])
        return {"total": forget + self.args.lambda_ * remain, "forget": forget, "remain": remain}

    def end_task(self, model):
        for hook in self.hooks:
            hook.remove()
        return TaskOutput()
