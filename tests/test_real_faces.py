"""A short run on real faces, through the command lines."""

from tests.conftest import results_of


def test_a_recogniser_of_real_faces_forgets_some_and_keeps_the_rest(faces, command, tmp_path):
    data = tmp_path / "sixteen"
    for split in ("train", "test"):
        (data / split).mkdir(parents=True)
        for person in sorted((faces / "orl40" / split).iterdir())[:16]:
            (data / split / person.name).symlink_to(person)
    options = ("--data", data, "--output-dir", tmp_path / "pretrained", "--depth", 2, "--epochs", 80)
    code, _, err = command("train_pretrain.py", *options)
    assert code == 0, err
    options = ("--data", data, "--checkpoint", tmp_path / "pretrained" / "checkpoint.pth", "--output-dir", tmp_path / "run")
    settings = ("--num-tasks", 1, "--forget-per-task", 4, "--epochs", 10, "--batch-size", 16, "--data-ratio", 1)
    code, _, err = command("train_forget.py", *options, *settings, "--sparsity-warmup-epochs", 2)
    assert code == 0, err
    (task,) = results_of(tmp_path / "run")["tasks"]
    assert task["setting"] == "16-4"
    assert task["before"]["acc_forget"] >= 60
    assert task["after"]["acc_forget"] <= 15
    assert task["after"]["acc_remain"] >= task["before"]["acc_remain"] - 10
