import os,sys
import torch; torch.set_num_threads(1)
import lowres, lowres.run.foresight as FS
if len(sys.argv)>1:
    from lowres.core.errors import InputError
    def bad(*a,**k): raise InputError("the budget",["boom"])
    FS.plan=bad
r=lowres.load_recipe("/work/main/recipes/quickstart.yaml",["loop.epochs=0.05","task.eval_examples=20","loop.micro_batch_size=8"])
rec=lowres.run(r,output_folder=f"/tmp/review/two{len(sys.argv)}{os.getpid() if False else ''}",quiet=True)
if os.environ.get("RANK")=="0": print("ok",rec.outcome,rec.plan["step"]["tokens_per_second"],rec.plan["notes"],rec.plan["phases"]["steady_steps"]["live_bytes"],rec.measured.phases["steady_steps"].live_bytes, rec.plan["step"]["seconds"], rec.measured.step_time)
