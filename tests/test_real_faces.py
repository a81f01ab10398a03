"""A short run on real faces, through the command lines."""

from tests.conftest import results_of


def test_a_recogniser_of_real_faces_forgets_some_and_keeps_the_rest(faces, command, tmp_path):
    options = ("--data", faces / "orl40", "--output-dir", tmp_path / "pretrained", "--epochs", 80)
    code, _, err = command("train_pretrain.py", *options)
    assert code == 0, err
    options = ("--data", faces / "orl40", "--checkpoint", tmp_path / "pretrained" / "checkpoint.pth")
    settings = ("--num-tasks", 1, "--epochs", 20, "--batch-size", 16, "--data-ratio", 1, "--sparsity-warmup-epochs", 2)
    code, _, err = command("train_forget.py", *options, *settings, "--output-dir", tmp_path / "run")
    assert code == 0, err
    (task,) = results_of(tmp_path / "run")["tasks"]
    assert task["setting"] == "40-4"
    assert task["before"]["acc_forget"] >= 60
    assert task["after"]["acc_forget"] <= 15
    assert task["after"]["acc_remain"] >= task["before"]["acc_remain"] - 10
