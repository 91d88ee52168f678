"""What a trained model is used for: predicting images, writing the predictions, exporting to ONNX."""
