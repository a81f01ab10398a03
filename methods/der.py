"""DER and DER++: dark experience replay (Buzzega et al., NeurIPS 2020, arXiv 2004.07211)."""

from dataclasses import replace

from methods.base import Option
from methods.distillation import RelabelAndMatch


class DER(RelabelAndMatch):
    """L = CE(z_f, ỹ) + λ · ‖h_r − h_r^teacher‖², h the label-free logits, the squared norm averaged over the batch.

    Of embeddings, the squared distance is summed over the batch, as published.
    """

    name = "der"
    title = "DER"
    options = [
        *RelabelAndMatch.options,
        Option("lr", 2e-3, published=1e-3),
        Option("lambda", 0.03, "weight λ of the matched outputs", published=0.01),
        Option("distill_on", "logits", "outputs to match", published="embeddings", choices=("logits", "embeddings")),
    ]

    def loss(self, model, batch):
        embeddings = model.embed(batch.images)
        logits, labels, indices = map(batch.split, (model.head(embeddings), batch.labels, batch.indices))
        forget = self.forget_loss(model, logits["forget"], labels["forget"])
        if self.args.distill_on == "logits":
            matched = (logits["remain"] - self.teacher.logits(indices["remain"])).square().sum(dim=1).mean()
        else:
            target = self.teacher.embeddings(indices["remain"])
            matched = (batch.split(embeddings)["remain"].float() - target).square().sum()
        losses = {"total": forget + self.args.lambda_ * matched, "forget": forget, "matched": matched}
        if "replay" in batch.sizes:
            losses["replay"] = model.head.loss_of_logits(logits["replay"], labels["replay"])
            losses["total"] = losses["total"] + self.args.lambda_replay * losses["replay"]
        return losses


class DERpp(DER):
    """L = CE(z_f, ỹ) + λ · ‖h_r − h_r^teacher‖² + λ₂ · CE(z_r′, y_r′), r′ a second, independent batch of D_r."""

    name = "der_pp"
    title = "DER++"
    options = [
        *DER.options,
        Option("lr", 1e-3),
        Option("lambda", 0.001, "weight λ of the matched outputs", published=0.005),
        Option("lambda_replay", 2.0, "weight λ₂ of the replay", published=0.005),
    ]

    def passes(self, task, epoch, epochs):
        (plan,) = super().passes(task, epoch, epochs)
        return [replace(plan, streams=plan.streams | {"replay": task.remain_indices})]
