// The operators' schemas, once. Meanings: csrc/core; fake kernels and autograd: wscl_fast/_ops. allow_tf32:
// products of float32 rows on CUDA may have TF32's accuracy; on a CPU it means nothing.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(wscl_fast, m) {
  m.def(
      "infonce_forward(Tensor queries, Tensor? keys, Tensor query_clusters, Tensor? key_clusters, Tensor? own,"
      " Tensor scale, bool exclude_self, bool inner, int ignore_index, bool need_direction,"
      " bool allow_tf32=False)"
      " -> (Tensor loss, Tensor count, Tensor stats, Tensor direction)");
  m.def(
      "infonce_reduced(Tensor queries, Tensor? keys, Tensor query_clusters, Tensor? key_clusters, Tensor? own,"
      " Tensor? scale, float constant_scale, bool exclude_self, bool inner, int ignore_index, bool mean,"
      " bool need_queries, bool need_keys, bool need_scale, int room)"
      " -> (Tensor loss, Tensor count, Tensor grad_queries, Tensor grad_keys, Tensor grad_scale)");
  m.def(
      "infonce_backward(Tensor grad_loss, Tensor queries, Tensor? keys, Tensor query_clusters,"
      " Tensor? key_clusters, Tensor? own, Tensor scale, bool exclude_self, bool inner, int ignore_index,"
      " Tensor count, Tensor stats, Tensor direction, bool need_queries, bool need_keys, bool need_scale,"
      " bool allow_tf32=False)"
      " -> (Tensor grad_queries, Tensor grad_keys, Tensor grad_scale)");
  m.def(
      "infonce_reduced_forward(Tensor queries, Tensor? keys, Tensor query_clusters, Tensor? key_clusters,"
      " Tensor? own, Tensor? scale, float constant_scale, bool exclude_self, bool inner, int ignore_index,"
      " bool mean, bool need_direction, bool allow_tf32)"
      " -> (Tensor loss, Tensor count, Tensor direction, Tensor kept)");
  m.def(
      "infonce_reduced_backward(Tensor grad_loss, Tensor queries, Tensor? keys, Tensor query_clusters,"
      " Tensor? key_clusters, Tensor? own, Tensor? scale, float constant_scale, bool exclude_self, bool inner,"
      " int ignore_index, Tensor direction, Tensor kept, bool need_queries, bool need_keys, bool need_scale,"
      " bool allow_tf32)"
      " -> (Tensor grad_queries, Tensor grad_keys, Tensor grad_scale)");
  m.def(
      "infonce_forward_in_batch(Tensor queries, Tensor clusters, Tensor scale, bool exclude_self, bool inner,"
      " int ignore_index, int room) -> (Tensor loss, Tensor count, Tensor stats, Tensor logits)");
  m.def(
      "infonce_backward_in_batch(Tensor grad_loss, Tensor queries, Tensor clusters, Tensor scale,"
      " bool exclude_self, bool inner, int ignore_index, Tensor count, Tensor stats, Tensor logits)"
      " -> (Tensor grad_queries, Tensor grad_scale)");
  m.def(
      "logsumexp(Tensor queries, Tensor keys, Tensor? query_ids, Tensor? key_ids, Tensor? own, Tensor scale,"
      " int meets, int ignore_index, bool need_mean, bool allow_tf32=False) -> (Tensor lse, Tensor stats, "
      "Tensor mean)");
  m.def(
      "logsumexp_key_gradient(Tensor grad, Tensor queries, Tensor keys, Tensor? query_ids, Tensor? key_ids,"
      " Tensor? own, Tensor scale, int meets, int ignore_index, Tensor stats, bool allow_tf32=False) -> "
      "Tensor");
  m.def(
      "two_way_logsumexp(Tensor queries, Tensor keys, Tensor? query_ids, Tensor? key_ids, Tensor? own,"
      " Tensor scale, int meets, int ignore_index, bool allow_tf32=False)"
      " -> (Tensor row_lse, Tensor column_lse, Tensor row_stats, Tensor column_stats)");
  m.def(
      "two_way_logsumexp_backward(Tensor grad_rows, Tensor grad_columns, Tensor queries, Tensor keys,"
      " Tensor? query_ids, Tensor? key_ids, Tensor? own, Tensor scale, int meets, int ignore_index,"
      " Tensor row_stats, Tensor column_stats, bool need_queries, bool need_keys, bool allow_tf32=False)"
      " -> (Tensor grad_queries, Tensor grad_keys)");
  m.def(
      "two_way_logsumexp_with_room(Tensor queries, Tensor keys, Tensor? query_ids, Tensor? key_ids,"
      " Tensor? own, Tensor scale, int meets, int ignore_index, int room)"
      " -> (Tensor row_lse, Tensor column_lse, Tensor row_stats, Tensor column_stats, Tensor logits)");
  m.def(
      "two_way_logsumexp_with_room_backward(Tensor grad_rows, Tensor grad_columns, Tensor queries, Tensor keys,"
      " Tensor? query_ids, Tensor? key_ids, Tensor? own, Tensor scale, int meets, int ignore_index,"
      " Tensor row_stats, Tensor column_stats, Tensor logits) -> (Tensor grad_queries, Tensor grad_keys)");
  m.def(
      "softplus_sum(Tensor queries, Tensor keys, Tensor? query_ids, Tensor? key_ids, Tensor? own, Tensor scale,"
      " Tensor offset, int meets, int ignore_index, bool need_direction, bool allow_tf32=False)"
      " -> (Tensor sum, Tensor slope, Tensor direction)");
  m.def(
      "softplus_sum_key_gradient(Tensor grad, Tensor queries, Tensor keys, Tensor? query_ids, Tensor? key_ids,"
      " Tensor? own, Tensor scale, Tensor offset, int meets, int ignore_index, bool allow_tf32=False) -> "
      "Tensor");
  m.def(
      "kmeans_assign(Tensor x, Tensor centroids, bool cosine, int top, int candidates)"
      " -> (Tensor assignment, Tensor distance, Tensor bad_row)");
  m.def(
      "kmeans_update(Tensor x, Tensor centroids, Tensor? weights, bool cosine, int candidates)"
      " -> (Tensor assignment, Tensor distance, Tensor sums, Tensor counts, Tensor inertia, Tensor bad_row)");
  m.def(
      "kmeans_update_bounded(Tensor x, Tensor centroids, Tensor(a!) assignment, Tensor(b!) distance,"
      " Tensor(c!) lower, Tensor(d!) sums,"
      " Tensor? previous, Tensor? half, Tensor? weights, bool cosine, int candidates)"
      " -> (Tensor counts, Tensor inertia, Tensor peak, Tensor tally)");
  m.def(
      "kmeans_distances(Tensor x, Tensor centroids, Tensor assignment, Tensor? weights, bool cosine)"
      " -> (Tensor distance, Tensor inertia)");
  m.def(
      "kmeans_potentials(Tensor x, Tensor candidates, Tensor nearest, Tensor? scale, Tensor? weights)"
      " -> (Tensor distance, Tensor potential)");
  m.def(
      "tag_weighted_sum(Tensor row_tags, Tensor column_tags, Tensor values, bool jaccard)"
      " -> (Tensor sums, Tensor totals)");
}
