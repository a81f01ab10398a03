"""GS-LoRA++: prototypes and weight averaging (Zhao et al., arXiv 2501.09705)."""

import torch
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from backbone.recognizer import Recognizer
from data.image_set import ImageSet
from data.tasks import ForgettingTask
from methods.base import Option, per_task
from methods.distillation import kl_divergence
from methods.gs_lora import GSLoRA
from util.evaluation.evaluate import embed_images


class GSLoRApp(GSLoRA):
    """GS-LoRA's L + λ_f · ReLU(BND_p − KL(p_y ‖ e_f)) + λ_r · KL(p_y ‖ e_r)

    p_c is the mean embedding of class c under the pre-trained model, over the images that the first task shows; both
    sides of KL go through a softmax over the embedding's dimensions, averaged over the batch. From epoch `ema_start` on
    the adapters are averaged once an epoch, and the average is what the task leaves.

    Published, prototypes are those of the model that enters the task, over the task's images, and no average is left.
    """

    name = "gs_lora_pp"
    title = "GS-LoRA++"
    options = [
        *GSLoRA.options,
        Option("bound", 120.0, "BND, the cross entropy beyond which forgetting is enough", published=105.0),
        Option(
            "lambda_forget",
            [0.01],
            "weight λ_f of forgotten images' distance to prototypes, for all tasks or one each",
            few_shot=[0.015, 0.06, 0.025, 0.012],
        ),
        Option("lambda_remain", 10.0, "weight λ_r of remaining images' distance to prototypes", published=0.0),
        Option("prototype_bound", 18.0, "BND_p, the KL beyond which an image is far enough", few_shot=50.0),
        Option("prototypes", "run", "model entering the run or task", published="task", choices=("run", "task")),
        # 0 leaves the last weights: the published code keeps an average beside them (0.9 from epoch 30) and saves them.
        Option("ema_decay", 0.9, "decay of the moving average, per epoch", published=0.0, high=1),
        Option("ema_start", 2, "first epoch (from 0) of the averaging", published=30),
    ]

    def begin_run(self, model, tasks, train_set):
        if self.args.prototypes == "run":
            self.prototypes = self._class_means(model, tasks[0], train_set)

    def _class_means(self, model: Recognizer, task: ForgettingTask, train_set: ImageSet) -> Tensor:
        """The mean embedding of every class over the task's images, (classes, dim)."""
        seen = torch.cat([task.forget_indices, task.remain_indices])
        embeddings = embed_images(model, train_set, self.hardware, seen).clone()
        labels = train_set.labels[seen.to(train_set.labels.device)].to(embeddings.device)
        sums = embeddings.new_zeros(len(train_set.classes), embeddings.shape[1]).index_add(0, labels, embeddings)
        # Classes without images have no prototype, and are never asked for one.
        counts = torch.bincount(labels, minlength=len(sums)).clamp(min=1)
        return sums / counts[:, None]

    def prepare(self, model):
        if self.args.prototypes == "task":
            self.prototypes = self._class_means(model, self.task, self.train_set)
        super().prepare(model)
        self.lambda_forget = per_task(self.args.lambda_forget, self.task)
        self.adapters = nn.ParameterList([p for group in self.groups.values() for p in group])
        self.average = AveragedModel(self.adapters, multi_avg_fn=get_ema_multi_avg_fn(self.args.ema_decay))

    def terms(self, model: Recognizer, embeddings: dict[str, Tensor], labels: dict[str, Tensor]) -> dict[str, Tensor]:
        losses = super().terms(model, embeddings, labels)
        distance = {name: kl_divergence(self.prototypes[labels[name]], embeddings[name]) for name in ("forget", "remain")}
        losses["prototype_forget"] = relu(self.args.prototype_bound - distance["forget"])
        losses["prototype_remain"] = distance["remain"]
        added = self.lambda_forget * losses["prototype_forget"] + self.args.lambda_remain * losses["prototype_remain"]
        return losses | {"total": losses["total"] + added}

    def end_epoch(self, model, epoch):
        if epoch >= self.args.ema_start:
            self.average.update_parameters(self.adapters)
        return super().end_epoch(model, epoch)

    @torch.no_grad()
    def end_task(self, model):
        if self.average.n_averaged > 0:
            for parameter, average in zip(self.adapters, self.average.module, strict=True):
                parameter.copy_(average)
        self.average = None
        return super().end_task(model)
