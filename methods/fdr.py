"""FDR: function distance regularization (Benjamin et al., ICLR 2019, arXiv 1805.08289)."""

from methods.base import Option
from methods.distillation import RelabelAndMatch


class FDR(RelabelAndMatch):
    """L = CE(z_f, ỹ) + λ · mean ‖p_r − p_r^teacher‖₂, p the softmax of the label-free logits, the mean over the batch.

    The published code takes the raw training logits for p. Their margins, equal on both sides, cancel with CosFace, so
    `--distill-on logits` takes the label-free ones.
    """

    name = "fdr"
    title = "FDR"
    options = [
        *RelabelAndMatch.options,
        Option("lr", 5e-4, published=1e-3),
        Option("lambda", 20.0, "weight λ of the distance", published=50.0),
        Option("distill_on", "probabilities", "outputs to match", published="logits", choices=("probabilities", "logits")),
    ]

    def loss(self, model, batch):
        logits, labels, indices = map(batch.split, (model(batch.images), batch.labels, batch.indices))
        forget = self.forget_loss(model, logits["forget"], labels["forget"])
        outputs = [logits["remain"], self.teacher.logits(indices["remain"])]
        if self.args.distill_on == "probabilities":
            outputs = [each.softmax(dim=1) for each in outputs]
        distance = (outputs[0] - outputs[1]).norm(dim=1).mean()
        return {"total": forget + self.args.lambda_ * distance, "forget": forget, "distance": distance}
