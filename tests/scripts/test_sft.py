from helpers_scripts import SFT, write_recipe

from trl_dllm.scripts import sft


def test_sft_rows_carry_nothing_but_the_conversation(tmp_path, tiny_checkpoint):
    config = write_recipe(tmp_path, SFT, model_name_or_path=tiny_checkpoint, output_dir=str(tmp_path / "sft"))
    trainer = sft.main(*sft.make_parser().parse_args_and_config(["--config", config]))
    assert trainer.state.global_step == 2
