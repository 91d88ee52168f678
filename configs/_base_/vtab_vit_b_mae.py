_base_ = ['./spt_vit_b_mae.py', './vtab1k.py']

model = dict(head=dict(num_classes=_base_.tasks[_base_.task]['num_classes']))
