// The experts of a MoE layer for tokens that are all here: y_t = sum over k of weight_tk * expert(x_t).
#include "expert_tiles.h"

// 0, or 1 where an id is no expert's: y is then not written. `room` holds whatever `expert_native.py` counts for
// `at_once` tokens, and gaps up to multiples of 64 bytes.
template <class L, class X = typename L::number>
static int experts(L layer, const X *x, const int64_t *ids, const float *weights, X *y, char *room, long T, long K,
                   long at_once, int threads) {
    long most = at_most(T, at_once) * K;
    Plan &plan = layer.plan;
    take(plan.first_E, room, layer.E + 1);
    take(plan.parts, room, most);
    take(plan.token_R, room, most);
    take(plan.slot_TK, room, most);
    layer.find_room(room, most);
    for (long i = 0; ids && i < T * K; i++)
        if (ids[i] >= layer.E) return 1;
    for (long t = 0; t < T; t += at_once) {
        long own = at_most(T - t, at_once);
        plan.make(ids ? ids + t * K : nullptr, own, K, layer.E);
        layer.cut(threads);
        layer.run(x + t * layer.D, weights ? weights + t * K : nullptr, y + t * layer.D, own, K, threads);
    }
    return 0;
}

template <class X> static Layer<X> layer(const void *const *w, long D, long E, long F, long P) {
    return {(const X *)w[0], (const X *)w[1], (const X *)w[2], (const X *)w[3], D, E, F, P};
}

extern "C" int experts_bf16(const void *x, const void *ids, const void *weights, const void *w_in, const void *b_in,
                            const void *w_out, const void *b_out, void *y, void *room, long T, long K, long D, long E,
                            long F, long P, long at_once, int threads) {
    const void *w[4] = {w_in, b_in, w_out, b_out};
    auto plain = layer<bf16>(w, D, E, F, P);
#if COTERIE_TILES
    if (TiledLayer::takes(D, F))
        return experts(TiledLayer{plain}, (const bf16 *)x, (const int64_t *)ids, (const float *)weights, (bf16 *)y,
                       (char *)room, T, K, at_once, threads);
#endif
    return experts(plain, (const bf16 *)x, (const int64_t *)ids, (const float *)weights, (bf16 *)y, (char *)room, T,
                   K, at_once, threads);
}

extern "C" int experts_fp32(const void *x, const void *ids, const void *weights, const void *w_in, const void *b_in,
                            const void *w_out, const void *b_out, void *y, void *room, long T, long K, long D, long E,
                            long F, long P, long at_once, int threads) {
    const void *w[4] = {w_in, b_in, w_out, b_out};
    return experts(layer<float>(w, D, E, F, P), (const float *)x, (const int64_t *)ids, (const float *)weights,
                   (float *)y, (char *)room, T, K, at_once, threads);
}
