_base_ = ['../_base_/coco_dino_r50.py']

model = dict(
    _delete_=True,
    type='mona_mm.PeftModel',
    base={{_base_.model}},
    targets=[dict(path='{encoder,decoder}.layers.*.{self_attn,cross_attn}.**', type='LoRA', rank=16, alpha=16)],
    trainable=['bbox_head', 'dn_query_generator'],  # whose sizes are the number of classes
)
load_from = (
    'https://download.openmmlab.com/mmdetection/v3.0/dino/dino-4scale_r50_8xb2-12e_coco/'
    'dino-4scale_r50_8xb2-12e_coco_20221202_182705-55b2bba2.pth'
)
