_base_ = ['./spt_convnext_b.py', './vtab1k.py']

model = dict(head=dict(num_classes=_base_.tasks[_base_.task]['num_classes']))
