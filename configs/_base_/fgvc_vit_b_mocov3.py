_base_ = ['./spt_vit_b_mocov3.py', './fgvc.py']

model = dict(head=dict(num_classes=_base_.tasks[_base_.task]['num_classes']))
